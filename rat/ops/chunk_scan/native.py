"""The chunked gated recurrence on a CPU: `gated_scan.native`, whose state starts anew in every chunk."""

from collections.abc import Sequence

from torch import Tensor

from rat.ops.chunk_scan import portable
from rat.ops.gated_scan import native


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
    if not native.has_kernels(gate_logits, streams):
        return portable.chunk_scan(
            gate_logits, streams, gate_bias, initial_state, chunk_positions, frozen, chunk_size, regular
        )
    if regular:
        return native.scan(gate_logits, streams, gate_bias, None, None, None, chunk_size)
    return native.scan(gate_logits, streams, gate_bias, initial_state, chunk_positions == 0, frozen, 0)
