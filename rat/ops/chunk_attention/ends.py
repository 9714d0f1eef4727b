"""Which chunk ends a token may see, documents and earlier calls included."""

from typing import NamedTuple

import torch
from torch import Tensor

from rat.ops.backend import Backend
from rat.ops.rotary import rotary


class Ends(NamedTuple):
    """The keys and values at the last token of chunks, and the span of them that each token sees.

    Neither bound ever falls from one token of a row to the next.
    """

    keys: Tensor  # (B, E, H, d), rotated already
    values: Tensor  # (B, E, H, d)
    first: Tensor  # (B, T) int64: the first end that a token sees
    last: Tensor  # (B, T) int64: one past the last end that a token sees


def find_ends(
    k: Tensor, v: Tensor, chunk_size: int, rope_base: float | None, place: Tensor, backend: Backend | None
) -> Ends:
    """The ends of the chunks that close among these tokens; `place` (B, T) is a token's position in its document.

    A token in chunk c of its document sees that document's c earlier ends. A last chunk that does not fill up has
    no end: nothing could see it.
    """
    batch, length = place.shape
    chunk = place // chunk_size
    is_end = place % chunk_size == chunk_size - 1
    last = is_end.cumsum(1) - is_end.long()
    slots = length // chunk_size
    index = place.new_zeros(batch, slots + 1)
    tokens = torch.arange(length, device=k.device).expand(batch, length)
    index.scatter_(1, torch.where(is_end, last, slots), tokens)
    index = index[:, :slots]
    rows = torch.arange(batch, device=k.device)[:, None]
    keys, values = k[rows, index], v[rows, index]
    if rope_base is not None and slots:
        keys = rotary(keys, chunk[rows, index], base=rope_base, backend=backend)
    return Ends(keys, values, last - chunk, last)


def regular_ends(
    k: Tensor, v: Tensor, chunk: Tensor, chunk_size: int, rope_base: float | None, backend: Backend
) -> Ends:
    """`find_ends` for rows that hold one document each, from its first token on: a strided slice.

    `chunk` (B, T) is the index of each token's chunk.
    """
    keys, values = k[:, chunk_size - 1 :: chunk_size], v[:, chunk_size - 1 :: chunk_size]
    if rope_base is not None and keys.shape[1]:
        chunks = torch.arange(keys.shape[1], device=k.device)
        keys = rotary(keys, chunks, base=rope_base, backend=backend)
    return Ends(keys, values, torch.zeros_like(chunk), chunk)


def given_ends(keys: Tensor, values: Tensor, chunk: Tensor) -> Ends:
    """The ends of a decoding state: a token in chunk c sees the first c of them."""
    return Ends(keys, values, torch.zeros_like(chunk), chunk)


def join_ends(given: Ends, found: Ends, continues: Tensor) -> Ends:
    """Tokens that continue a document (B, T) see the given ends, the others those found in this call."""
    shift = given.keys.shape[1]
    return Ends(
        torch.cat([given.keys, found.keys], dim=1),
        torch.cat([given.values, found.values], dim=1),
        torch.where(continues, given.first, found.first + shift),
        torch.where(continues, given.last, found.last + shift),
    )
