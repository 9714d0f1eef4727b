"""Language models between recurrence and attention: models, layers and operations, free of any trainer."""

from rat.config import ModelConfig
from rat.interop.huggingface.registration import register_with_transformers
from rat.layers import ContextShard
from rat.model import CausalLM

register_with_transformers()

__all__ = ["CausalLM", "ContextShard", "ModelConfig"]
