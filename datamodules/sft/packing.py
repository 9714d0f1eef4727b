"""How documents share rows, and what that saves."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]


def padded_lengths(lengths: Lengths, chunk_size: int) -> Lengths:
    """Every length (N,) up to the next multiple of `chunk_size`, so that no chunk holds two documents."""
    return -(-lengths // chunk_size) * chunk_size


def pack(lengths: Lengths, seq_len: int, chunk_size: int) -> list[list[int]]:
    """Rows of documents, each document once, by best fit: the longest first, each into the fullest row it fits in.

    The same lengths give the same rows.

    Args:
        lengths: (N,) tokens of every document, 1 to `seq_len`.
        seq_len: T, tokens of a row.
        chunk_size: documents take up a multiple of it.

    Returns:
        The numbers of the documents in every row, in their order there.

    Raises:
        ValueError: seq_len is no multiple of chunk_size, or a document is longer than a row.
    """
    if seq_len % chunk_size:
        raise ValueError(f"packed rows are whole chunks: seq_len={seq_len} must be a multiple of {chunk_size=}")
    sizes = padded_lengths(lengths, chunk_size)
    if len(sizes) and sizes.max() > seq_len:
        raise ValueError(f"document {sizes.argmax()} has {lengths[sizes.argmax()]} tokens, a row {seq_len}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), in order
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        place = bisect_left(room, (size, 0))
        if place == len(room):
            free, row = seq_len, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(document)
        if free > size:
            insort(room, (free - size, row))
    return rows


class Padding(NamedTuple):
    """Which share of the tokens is padding, and which share of the padding packing saves."""

    padded: float
    packed: float
    saved: float

    def __str__(self) -> str:
        return (
            f"{self.padded:.1%} padding in padded rows, {self.packed:.1%} in packed ones:"
            f" packing saves {self.saved:.1%} of it"
        )


def padding(lengths: Lengths, seq_len: int, chunk_size: int) -> Padding:
    """How much padding documents of these lengths (N,) need, a row of `seq_len` each and packed; see `pack`."""
    tokens = int(lengths.sum())
    alone = len(lengths) * seq_len
    together = len(pack(lengths, seq_len, chunk_size)) * seq_len
    saved = (alone - together) / (alone - tokens) if alone > tokens else 0.0
    return Padding(1 - tokens / alone, 1 - tokens / together, saved)
