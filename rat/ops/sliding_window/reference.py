"""Causal attention inside a window, with the mask written out."""

import torch
from torch import Tensor


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int, document_ids: Tensor | None) -> Tensor:
    """Query t sees key j when 0 <= t - j <= W and both stand in one document; shapes as in the public function."""
    length, width = q.shape[1], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    seen = ((distance >= 0) & (distance <= window_size)).expand(q.shape[0], length, length)
    if document_ids is not None:
        starts = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
        run = starts.cumsum(1)
        seen = seen & (run[:, :, None] == run[:, None, :])
    logits = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) * width**-0.5
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.to(wide)).to(v.dtype)
