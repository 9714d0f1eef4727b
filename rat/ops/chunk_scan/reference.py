"""The chunked gated recurrence, one token at a time."""

from collections.abc import Sequence

from torch import Tensor

from rat.ops.gated_scan import reference


def chunk_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    chunk_positions: Tensor,
    frozen: Tensor | None,
    chunk_size: int,
    regular: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The gated scan with an empty state before every token at chunk position 0."""
    restart = chunk_positions == 0
    return reference.gated_scan(gate_logits, streams, gate_bias, initial_state, restart, frozen)
