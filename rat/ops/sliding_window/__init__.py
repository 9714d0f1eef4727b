"""Causal softmax attention, whole or inside a sliding window."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, select
from rat.ops.documents import check_documents

_IMPLEMENTATIONS = implementations(__name__, "sliding_window_attention")


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None,
    document_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Causal attention in which token t sees the W + 1 keys t - W, ..., t (the paper's 'local attention').

    Args:
        q: (B, T, H, d) queries, rotated already where positions are wanted, T >= 1.
        k: (B, T, H, d) keys.
        v: (B, T, H, d) values.
        window_size: W >= 1; None for attention over the whole past.
        document_ids: (B, T); a token sees only its own document.

    Returns:
        (B, T, H, d).
    """
    if q.ndim != 4 or 0 in q.shape or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be (B, T, H, d) alike with T >= 1, got {shapes}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    check_documents(document_ids, *q.shape[:2])
    run = select(_IMPLEMENTATIONS, backend, q)
    return run(q, k, v, window_size or q.shape[1], document_ids)
