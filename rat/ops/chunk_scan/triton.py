"""The chunked gated recurrence in Triton: one launch where every chunk starts inside one program."""

from collections.abc import Sequence

from torch import Tensor

from rat.ops.gated_scan import triton

# A program walks whole chunks. Longer ones leave too few programs for a GPU (a row of 4096 tokens of 2048 channels has
# 128 of them at 64), and are better cut: the hand-over reads the inputs once more, half as many bytes again.
LONGEST_WALK = 64


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
    """As the reference; `regular` says that chunks start at tokens 0, L, 2L, ... of full rows."""
    if regular and chunk_size <= LONGEST_WALK:
        return triton.scan(gate_logits, streams, gate_bias, None, None, chunk_size)
    return triton.gated_scan(gate_logits, streams, gate_bias, initial_state, chunk_positions == 0, frozen)
