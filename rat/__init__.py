"""Language models between recurrence and attention: models, layers and operations, free of any trainer."""

from rat.config import ModelConfig
from rat.layers import ContextShard
from rat.model import CausalLM

__all__ = ["CausalLM", "ContextShard", "ModelConfig"]
