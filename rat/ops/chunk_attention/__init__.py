"""Attention over chunk ends: the attention half of a RAT layer."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, select
from rat.ops.chunk_attention.ends import Ends, find_ends, given_ends, join_ends
from rat.ops.chunk_attention.weights import chunk_attention_weights
from rat.ops.chunk_scan import check_chunks
from rat.ops.documents import check_documents, positions, start_indices

_IMPLEMENTATIONS = implementations(__name__, "chunk_attention")


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    rope_base: float | None = None,
    offset: Tensor | None = None,
    ends: tuple[Tensor, Tensor] | None = None,
    document_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One softmax over the last tokens of all earlier chunks and the token itself (RAT eq. 3-4, arXiv 2507.04416).

    Args:
        q: (B, T, G, d) queries, T >= 1, G dividing H; head h asks with query group h mod G.
        k: (B, T, H, d) keys after the recurrence, not rotated.
        v: (B, T, H, d) values after the recurrence.
        chunk_size: L >= 1; chunks start at the positions 0, L, 2L, ... of every document.
        rope_base: rotate q and k by their chunk's index with this base; None for no positions.
        offset: (B,) tokens of the (first) document that went through earlier calls; needs `ends`.
        ends: keys (rotated) and values (B, E, H, d) at the ends of the (first) document's chunks, those that close
            in this call included: a token in chunk c sees the first c of them.
        document_ids: (B, T); a token sees only its own document.

    Returns:
        (B, T, H, d). In the first chunk of a document it is v itself.
    """
    _check(q, k, v, rope_base, offset, ends)
    batch, length = k.shape[:2]
    check_chunks(chunk_size, offset, batch)
    check_documents(document_ids, batch, length)
    place = positions(batch, length, document_ids, offset, k.device)
    seen = None  # rows of one document from its first token on: every L-th token is an end
    if ends is not None:
        seen = given_ends(*ends, place // chunk_size)
        if document_ids is not None:
            fresh = positions(batch, length, document_ids, None, k.device)
            found = find_ends(k, v, chunk_size, rope_base, fresh, backend)
            seen = join_ends(seen, found, start_indices(document_ids) == 0)
    elif document_ids is not None:
        seen = find_ends(k, v, chunk_size, rope_base, place, backend)
    run = select(_IMPLEMENTATIONS, backend, k)
    return run(q, k, v, seen, place // chunk_size, chunk_size, rope_base)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_base: float | None,
    offset: Tensor | None,
    ends: tuple[Tensor, Tensor] | None,
) -> None:
    if k.ndim != 4 or 0 in k.shape or v.shape != k.shape:
        raise ValueError(f"k and v must be (B, T, H, d) with T >= 1, got {tuple(k.shape)} and {tuple(v.shape)}")
    batch, length, heads, width = k.shape
    if q.ndim != 4 or 0 in q.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != width or heads % q.shape[2]:
        raise ValueError(f"q must be ({batch}, {length}, a divisor of {heads}, {width}), got {tuple(q.shape)}")
    if rope_base is not None and width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}")
    if (offset is None) != (ends is None):
        raise ValueError("offset and ends go together: what went before, and the chunk ends it left")
    if ends is None:
        return
    for name, x in zip(("keys", "values"), ends, strict=True):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, width):
            raise ValueError(f"the ends' {name} must be ({batch}, E, {heads}, {width}), got {tuple(x.shape)}")
    if ends[0].shape[1] != ends[1].shape[1]:
        raise ValueError(f"as many end keys as end values, got {ends[0].shape[1]} and {ends[1].shape[1]}")


__all__ = ["Ends", "chunk_attention", "chunk_attention_weights"]
