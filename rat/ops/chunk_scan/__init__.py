"""The gated linear recurrence inside chunks: the recurrent half of a RAT layer."""

from collections.abc import Sequence

from torch import Tensor

from rat.ops.backend import Backend, implementations, select
from rat.ops.documents import positions
from rat.ops.gated_scan import Streams, check_scan, past_the_end

_IMPLEMENTATIONS = implementations(__name__, "chunk_scan")


def chunk_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    *,
    chunk_size: int,
    gate_bias: Tensor | None = None,
    initial_state: Sequence[Tensor] | None = None,
    offset: Tensor | None = None,
    lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Streams, Streams]:
    """`gated_scan` whose state is emptied before the first token of every chunk (RAT eq. 1-2, arXiv 2507.04416).

    Args:
        gate_logits: (B, T, D), any floating dtype, T >= 1.
        streams: the y of each recurrence, (B, T, D_i) with D_i dividing D; tiled over the gate.
        chunk_size: L >= 1; chunks start at the positions 0, L, 2L, ... of every document.
        gate_bias: (D,), added in fp32.
        initial_state: fp32 (B, D) for each stream: what a call that ended inside a chunk returned.
        offset: (B,) tokens of the (first) document that went through earlier calls. Without it rows start at 0,
            where a chunk begins and an initial state would be emptied unread.
        lengths: (B,) valid tokens of each row; later ones leave the state as it is.
        document_ids: (B, T); chunks restart at every document.

    Returns:
        The states at every token, (B, T, D) in each stream's dtype, and after the last one, fp32 (B, D).
    """
    check_scan(gate_logits, streams, gate_bias, initial_state, lengths, document_ids)
    batch, length, _ = gate_logits.shape
    check_chunks(chunk_size, offset, batch)
    if initial_state is not None and offset is None:
        raise ValueError("initial_state needs offset: how many tokens of each row went before")
    run = select(_IMPLEMENTATIONS, backend, gate_logits)
    place = positions(batch, length, document_ids, offset, gate_logits.device)
    regular = document_ids is None and offset is None and lengths is None
    frozen = past_the_end(lengths, gate_logits)
    return run(gate_logits, streams, gate_bias, initial_state, place % chunk_size, frozen, chunk_size, regular)


def check_chunks(chunk_size: int, offset: Tensor | None, batch: int) -> None:
    """Raise one ValueError for a chunk size below 1 or an offset that is not (B,)."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if offset is not None and offset.shape != (batch,):
        raise ValueError(f"offset must be ({batch},), got {tuple(offset.shape)}")
