"""The one description of a model: frozen, validated once, saved with every checkpoint."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self, get_args

# What transformers knows our models by.
MODEL_TYPE = "rat"

MixerName = Literal["rat", "attention", "sliding_window", "rnn"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model; defaults are the paper's (arXiv 2507.04416).

    Attributes:
        vocab_size: V, number of token ids.
        d_model: D, width of the residual stream.
        num_layers: blocks.
        num_heads: H; the head width is D / H.
        pattern: mixers of the layers, repeated until there are num_layers (["rat", "sliding_window"]: even layers
            RAT, odd ones sliding-window attention).
        chunk_size: L, tokens in a RAT chunk. 1 is attention over gated keys, max_seq_len an RNN.
        num_groups: G, query-key projections that RAT's heads share; divides num_heads.
        window_size: W of sliding-window attention; a token sees itself and W tokens before it.
        rope_base: base of the rotary positions; null for none at all (NoPE).
        max_seq_len: T of training. Only the RNN's gate initialisation reads it: no model has a longest input.
        norm_eps: of every RMSNorm.
        init_std: standard deviation of linear and embedding weights at the start.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    pattern: list[MixerName] | tuple[MixerName, ...] = ("rat",)
    chunk_size: int = 16
    num_groups: int = 2
    window_size: int = 1024
    rope_base: float | None = 10000.0
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Raise one ValueError that names the first field that does not fit."""
        object.__setattr__(self, "pattern", tuple(self.pattern))
        counts = "vocab_size d_model num_layers num_heads chunk_size num_groups window_size max_seq_len"
        for name in counts.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        unknown = [name for name in self.pattern if name not in get_args(MixerName)]
        if unknown or not self.pattern:
            raise ValueError(f"pattern must name {get_args(MixerName)}, got {list(self.pattern)}")
        if len(self.pattern) > self.num_layers:
            raise ValueError(f"pattern has {len(self.pattern)} mixers for num_layers {self.num_layers}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}")
        if "rat" in self.pattern and self.num_heads % self.num_groups:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_groups {self.num_groups}")
        base = self.rope_base
        if base is not None and (not isinstance(base, int | float) or not base > 1):
            raise ValueError(f"rope_base must be above 1, or null for no positions, got {base!r}")
        positioned = set(self.pattern) != {"rnn"} and base is not None
        if positioned and self.d_model // self.num_heads % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.d_model // self.num_heads}")

    def differences(self, other: Self) -> str:
        """In which fields another config describes another trained model, in words; how weights start is none."""
        mine, others = self.to_dict(), other.to_dict()
        keys = [key for key in mine if key not in ("init_std", "max_seq_len") and mine[key] != others[key]]
        return "; ".join(f"{key} is {mine[key]}, not {others[key]}" for key in keys)

    def layer_names(self) -> list[MixerName]:
        """The mixer of each layer, in order."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]

    def to_dict(self) -> dict[str, object]:
        """Plain values, as config.json holds them."""
        return asdict(self) | {"pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, values: dict[str, object], source: str = "config") -> Self:
        """The config of `to_dict`; `source` is named in the error for a key that is unknown or missing."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{source}: unknown keys {unknown}; a model config has {sorted(known)}")
        try:
            return cls(**values)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read config.json; a ValueError names the file that holds something else."""
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} holds no model config: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no model config, but a {type(values).__name__}")
        if (kind := values.pop("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(f"{path} describes a {kind}, and only models of type {MODEL_TYPE} are read here")
        if "transformers_version" in values:  # then its own fields stand there, too
            known = {field.name for field in fields(cls)}
            values = {key: value for key, value in values.items() if key in known}
        return cls.from_dict(values, str(path))
