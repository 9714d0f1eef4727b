"""Language models between recurrence and attention: models, layers and operations, free of any trainer."""

from rat.config import ModelConfig
from rat.model import CausalLM

__all__ = ["CausalLM", "ModelConfig"]
