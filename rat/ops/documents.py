"""Packed rows: several documents in one row, told apart by `document_ids` (B, T).

A document is a maximal run of equal ids in a row. The tokens of the first run may continue a document whose
earlier `offset` tokens went through a previous call.
"""

import torch
from torch import Tensor


def document_starts(document_ids: Tensor) -> Tensor:
    """True at the first token of every document; (B, T) ids -> (B, T) bool."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def start_indices(document_ids: Tensor) -> Tensor:
    """For every token, the index in its row at which its document starts; (B, T) -> (B, T) int64."""
    indices = torch.arange(document_ids.shape[1], device=document_ids.device)
    return torch.where(document_starts(document_ids), indices, 0).cummax(dim=1).values


def positions(
    batch: int, length: int, document_ids: Tensor | None, offset: Tensor | None, device: torch.device
) -> Tensor:
    """Each token's place in its document, counting the `offset` (B,) tokens of earlier calls; (B, T) int64."""
    place = torch.arange(length, device=device).expand(batch, length)
    first = None if document_ids is None else start_indices(document_ids)
    if first is not None:
        place = place - first
    if offset is None:
        return place
    carried = offset[:, None].expand(batch, length)
    return place + (carried if first is None else torch.where(first == 0, carried, 0))


def check_documents(document_ids: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless the ids are absent or integers of shape (B, T)."""
    if document_ids is None:
        return
    if document_ids.shape != (batch, length) or document_ids.is_floating_point():
        raise ValueError(
            f"document_ids must be integers of shape {(batch, length)}, "
            f"got {document_ids.dtype} of shape {tuple(document_ids.shape)}"
        )
