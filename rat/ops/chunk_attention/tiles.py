"""How large the tiles of the Triton kernels are, and what a launch with them reads.

Sizes follow from head width, dtype and GPU alone, never from the number of tokens: nothing is tuned or compiled again
because a length changed. They are the largest that spill no register at the widths 16, 32, 64, 128 and 256 on any of
sm_80, sm_90 and sm_100, in two stages; heads of other widths may put a few numbers of a thread in memory.
"""

from typing import NamedTuple

import torch

from rat.ops.launch import Capability

# A block has 99 KB of shared memory there, where an A100 gives it 163 KB: less of the widest heads at a time.
_SMALL_CHIPS = {(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}


class Tiles(NamedTuple):
    """Sizes of a launch that multiplies matrices."""

    tokens: int
    ends: int
    num_warps: int
    num_stages: int = 2


def forward_tiles(width: int, dtype: torch.dtype, chip: Capability) -> Tiles:
    """Tiles of the forward pass for heads of `width` channels."""
    if dtype == torch.float32:
        return _fp32_tiles(width)
    if width > 128:
        return _narrower(Tiles(64, 64 if chip >= (9, 0) else 32, 8, _wide_stages(chip)), width)
    return _narrower(Tiles(128, 64, 8), width)


def query_tiles(width: int, dtype: torch.dtype, chip: Capability) -> Tiles:
    """Tiles of the queries' gradient."""
    if dtype == torch.float32:
        return _fp32_tiles(width)
    if width > 128:
        return _narrower(Tiles(64, 32, 8, _wide_stages(chip)), width)
    return _narrower(Tiles(128, 64 if chip >= (9, 0) or width <= 64 else 32, 8), width)


def end_tiles(width: int, dtype: torch.dtype, chip: Capability) -> Tiles:
    """Tiles of the ends' gradients."""
    if dtype == torch.float32:
        tokens, ends, *rest = _fp32_tiles(width)
        return Tiles(ends, tokens, *rest)
    if width > 128:
        return Tiles(32, 32 if chip in _SMALL_CHIPS else 64, 8)
    return _narrower(Tiles(64, 64, 4 if width in (16, 32, 64) else 8), width)


def _wide_stages(chip: Capability) -> int:
    return 1 if chip in _SMALL_CHIPS else 2


def _narrower(tiles: Tiles, width: int) -> Tiles:
    """Of heads that do not fill a power of two, half a tile: their padding is masked, which takes registers."""
    if width.bit_count() == 1:
        return tiles
    if tiles.tokens > 64:
        return tiles._replace(tokens=tiles.tokens // 2)
    return tiles._replace(ends=tiles.ends // 2)


def _fp32_tiles(width: int) -> Tiles:
    """Products in full fp32 leave the tensor cores alone: a thread holds the rows and columns that it multiplies."""
    return Tiles(32 if width <= 128 else 16, 32 if width <= 64 else 16, 8)


def ends_read(length: int, chunk_size: int, tiles: Tiles) -> tuple[int, int]:
    """(ends read, tokens times ends multiplied) by all blocks of tokens of one head in a row of one document."""
    full, last = -(-length // tiles.tokens) - 1, (length - 1) // chunk_size
    read = _floor_sum(full, tiles.tokens, tiles.tokens - 1, chunk_size) + last
    start, step = tiles.tokens - 1 + chunk_size * (tiles.ends - 1), chunk_size * tiles.ends
    visits = _floor_sum(full, tiles.tokens, start, step) - (-last // tiles.ends)
    return read, visits * tiles.tokens * tiles.ends


def tokens_read(length: int, chunk_size: int, tiles: Tiles) -> int:
    """Tokens read by all tiles of ends of one head in a row of one document."""
    count = -(-(length // chunk_size) // tiles.ends)
    return count * length - chunk_size * (tiles.ends * count * (count - 1) // 2 + count)


def _floor_sum(count: int, slope: int, start: int, divisor: int) -> int:
    """The sum of (slope * i + start) // divisor over i < count: lattice points under a line, by Euclid's algorithm."""
    total = count * (count - 1) // 2 * (slope // divisor) + count * (start // divisor)
    slope, start = slope % divisor, start % divisor
    if not slope or not count:
        return total
    top, rest = divmod(slope * count + start, divisor)
    return total + _floor_sum(top, divisor, rest, slope)
