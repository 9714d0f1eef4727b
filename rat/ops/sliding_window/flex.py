"""Causal attention inside a window on PyTorch's FlexAttention, which skips the tiles of keys outside it.

Attention over the whole past has no tile to skip, and goes to PyTorch's flash kernel.
"""

import torch
from torch import Tensor

from rat.ops.backend import check_flex
from rat.ops.documents import start_indices
from rat.ops.sliding_window import portable
from rat.ops.spans import compiled_on_gpus, span_attention


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int, document_ids: Tensor | None) -> Tensor:
    """As the reference; on a CPU without gradients."""
    if document_ids is None and window_size >= q.shape[1] - 1:
        return portable.sliding_window_attention(q, k, v, window_size, None)
    check_flex(q, k, v)
    tokens = torch.arange(q.shape[1], device=q.device)[None]
    first = (tokens - window_size).clamp(min=0)
    if document_ids is not None:
        first = torch.maximum(first, start_indices(document_ids))
    return _attend(q, k, v, first, tokens + 1)


@compiled_on_gpus
def _attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return span_attention(q, k, v, first, last)[0]
