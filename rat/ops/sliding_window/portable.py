"""Causal attention inside a window on PyTorch's own attention kernels.

The first W queries see all that came before: plain causal attention. The others have whole windows, so blocks of m
of them, with the m + W keys they share, are one batched call under one constant (m x (m + W)) band.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rat.ops.documents import document_starts

FEWEST_ROWS = 64


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int, document_ids: Tensor | None) -> Tensor:
    """As the reference."""
    length = q.shape[1]
    runs = None if document_ids is None else document_starts(document_ids).cumsum(1)
    head = min(length, window_size) if length > window_size + 1 else length
    out = _causal(q[:, :head], k[:, :head], v[:, :head], None if runs is None else runs[:, :head])
    if head == length:
        return out
    return torch.cat([out, _band(q[:, head:], k, v, window_size, runs)], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """PyTorch's attention on (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, runs: Tensor | None) -> Tensor:
    if q.shape[1] == 0 or runs is None:
        return _attend(q, k, v, None, causal=True) if q.shape[1] else q
    same = runs[:, :, None] == runs[:, None, :]
    return _attend(q, k, v, same.tril()[:, None])


def _windows(x: Tensor, size: int, step: int, count: int) -> Tensor:
    """(B, T, ...) -> (B * count, size, ...): windows that start every `step` tokens, zeros past the end."""
    missing = (count - 1) * step + size - x.shape[1]
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    return padded.unfold(1, size, step).movedim(-1, 2).flatten(0, 1)


def _band(q: Tensor, k: Tensor, v: Tensor, window_size: int, runs: Tensor | None) -> Tensor:
    """Queries W, W + 1, ... of a row against the keys of the whole row."""
    batch, length = q.shape[:2]
    rows = min(length, max(FEWEST_ROWS, window_size // 2))
    count = -(-length // rows)
    queries = _windows(q, rows, rows, count)
    keys, values = (_windows(x, rows + window_size, rows, count) for x in (k, v))
    row = torch.arange(rows, device=q.device)[:, None]
    column = torch.arange(rows + window_size, device=q.device)
    mask = ((column >= row) & (column <= row + window_size)).expand(1, 1, -1, -1)
    if runs is not None:
        of_query = _windows(runs[:, window_size:, None], rows, rows, count)
        of_key = _windows(runs[:, :, None], rows + window_size, rows, count)
        # Rows of padding (run 0) see each other, so that no softmax is empty.
        mask = mask & (of_query == of_key.mT)[:, None]
    out = _attend(queries, keys, values, mask)
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :length]
