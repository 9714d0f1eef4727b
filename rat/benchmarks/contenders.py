"""The layers that are compared: every mixer, and RAT as one would write it at first."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from rat.benchmarks.footprint import available_bytes, kept_bytes
from rat.benchmarks.masked import MaskedRAT, ScoresRAT, SdpaRAT
from rat.benchmarks.options import one_of
from rat.benchmarks.steps import random_input
from rat.config import MixerName, ModelConfig
from rat.initialization import initialize
from rat.layers import Mixer
from rat.model import MIXERS
from rat.ops import Backend

Contender = Literal["rat", "attention", "sliding_window", "rnn", "rat_masked", "rat_sdpa"]

_MASKED: dict[str, type[MaskedRAT]] = {"rat_masked": ScoresRAT, "rat_sdpa": SdpaRAT}


def layer_config(
    contenders: Sequence[str], *, d_model: int, d_head: int, chunk_size: int, num_groups: int, window_size: int
) -> ModelConfig:
    """What the layers of a benchmark have in common.

    Raises:
        ValueError: an unknown contender, one named twice, or sizes that do not fit each other.
    """
    one_of("mixer", contenders, get_args(Contender))
    if d_head < 1 or d_model % d_head:
        raise ValueError(f"d_model {d_model} is not divisible by d_head {d_head}")
    pattern = [name if name in get_args(MixerName) else "rat" for name in contenders]
    return ModelConfig(
        vocab_size=1,
        d_model=d_model,
        num_layers=len(pattern),
        num_heads=d_model // d_head,
        pattern=pattern,  # type: ignore[arg-type]
        chunk_size=chunk_size,
        num_groups=num_groups,
        window_size=window_size,
    )


def make_layer(name: str, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Mixer:
    """A contender with fresh weights; the same ones for all forms of RAT under the same seed."""
    masked = _MASKED.get(name)
    if masked is None:
        layer = MIXERS[name](config)  # type: ignore[index]
    else:
        layer = masked(config.d_model, config.num_heads, config.chunk_size, config.num_groups, config.rope_base)
    initialize(layer, config.init_std)
    return layer.to(device, dtype)


def backend_of(name: str, chosen: Backend) -> Backend:
    """What a contender runs on: `chosen`, but attention never on the reference.

    In all other backends it is PyTorch's own scaled_dot_product_attention, the yardstick.
    """
    return "portable" if name == "attention" and chosen == "reference" else chosen


def too_large(layer: Mixer, batch_size: int, seq_len: int, train: bool, device: torch.device) -> str | None:
    """Why a contender cannot run at this length; None if it can. Only those that form pairs ever cannot."""
    if not isinstance(layer, MaskedRAT):
        return None
    needed, free = layer.workspace_bytes(batch_size, seq_len, train), available_bytes(device)
    if needed <= 0.8 * free:
        return None
    return f"its mask and scores would take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def kept_for_backward(layer: Mixer, batch_size: int, seq_len: int) -> int:
    """Bytes that a full pass over B rows of T tokens keeps for its backward, its input included."""
    x = random_input(layer, batch_size, seq_len).requires_grad_()
    return kept_bytes(lambda: layer(x), [x], layer.parameters())
