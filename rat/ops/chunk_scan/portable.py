"""The chunked gated recurrence in PyTorch: all chunks of a row advance side by side."""

from collections.abc import Sequence

from torch import Tensor

from rat.ops.gated_scan import portable

# Beyond this many tokens a chunk is better cut into blocks than walked token by token.
LONGEST_WALK = 128


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
    if regular and min(chunk_size, gate_logits.shape[1]) <= LONGEST_WALK:
        return portable.scan(gate_logits, streams, gate_bias, None, None, None, chunk_size)
    restart = chunk_positions == 0
    return portable.gated_scan(gate_logits, streams, gate_bias, initial_state, restart, frozen)
