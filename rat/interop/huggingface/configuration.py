"""A `ModelConfig` as transformers keeps one."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from rat.config import MODEL_TYPE, ModelConfig


class RATConfig(PreTrainedConfig):
    """The fields of `ModelConfig`, under the same names, and what transformers adds to every config.

    The model's head is its embedding. Raises ValueError for values that `ModelConfig` refuses.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_seq_len",
        "initializer_range": "init_std",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    # transformers makes configs without arguments to see what differs from the defaults: the paper's model.
    vocab_size: int = 32000
    d_model: int = 2048
    num_layers: int = 24
    num_heads: int = 16
    pattern: Sequence[str] = ModelConfig.pattern
    chunk_size: int = ModelConfig.chunk_size
    num_groups: int = ModelConfig.num_groups
    window_size: int = ModelConfig.window_size
    rope_base: float | None = ModelConfig.rope_base
    max_seq_len: int = ModelConfig.max_seq_len
    norm_eps: float = ModelConfig.norm_eps
    init_std: float = ModelConfig.init_std
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Raise ValueError for values that `ModelConfig` refuses."""
        self.pattern = list(self.pattern)
        super().__post_init__(**kwargs)
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The same as our own config."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})
