"""One call of the Triton kernels: its tensors as they take them, and what a launch over them moves."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rat.ops.chunk_attention import kernels, tiles
from rat.ops.chunk_attention.tiles import Tiles
from rat.ops.launch import Cost, launch
from rat.ops.rotary.portable import angles

# Elements of a tile in the kernels that multiply no matrices.
PLAIN_TILE = 2048


def rows_of(x: Tensor) -> Tensor:
    """x, or a copy, with heads whose channels lie side by side and begin where the kernels expect it."""
    step = alignment(x.shape[-1])
    fits = all(stride % step == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    return x if fits and x.stride(-1) == 1 else x.contiguous()


def alignment(width: int) -> int:
    """What every stride is a multiple of, in elements."""
    return math.gcd(width, 16)


class Call(NamedTuple):
    """One call: its inputs as the kernels take them."""

    q: Tensor  # (B, T, G, d)
    k: Tensor  # (B, T, H, d)
    v: Tensor  # (B, T, H, d)
    keys: Tensor  # (B, E, H, d), turned
    values: Tensor
    spans: Tensor | None  # (3, B, T) int32: chunk, first, last
    cos: Tensor  # (E + 1, d / 2) fp32, one row a chunk
    sin: Tensor
    chunk_size: int
    rotary: bool

    @property
    def batch(self) -> int:
        """B."""
        return self.k.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.k.shape[2]

    @property
    def groups(self) -> int:
        """G."""
        return self.q.shape[2]

    @property
    def width(self) -> int:
        """d."""
        return self.k.shape[3]

    @property
    def ends(self) -> int:
        """E."""
        return self.keys.shape[1]

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.width**-0.5)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What most kernels begin with."""
        return self.batch, self.length, self.heads, self.groups, self.chunk_size

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Angles and spans; any tensor where there are none, as it is never read."""
        return self.cos, self.sin, self.cos if self.spans is None else self.spans

    @property
    def block_d(self) -> int:
        """Columns of a tile."""
        return max(16, triton.next_power_of_2(self.width))

    @property
    def constants(self) -> dict[str, Any]:
        """What most kernels are compiled for."""
        return {
            "SPANS": self.spans is not None,
            "ALIGN": alignment(self.width),
            "WIDTH": self.width,
            "BLOCK_D": self.block_d,
        }

    def tiled(self, sizes: Tiles) -> dict[str, Any]:
        """Constants and options of a launch that multiplies tiles."""
        options = {
            "BLOCK_M": sizes.tokens,
            "BLOCK_N": sizes.ends,
            "PRECISION": "tf32",
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        }
        if self.q.dtype == torch.float32:
            options["PRECISION"] = "ieee"  # tensor cores would lose 13 bits
        if self.q.dtype == torch.float32 or self.width != self.block_d:
            # Unless it is told how many registers there are, the compiler spills a few bytes here so that one program
            # more can be resident.
            options["maxnreg"] = 255
        return options | self.constants

    @property
    def plain_rows(self) -> int:
        """Rows of a tile in the kernels that multiply no matrices."""
        return PLAIN_TILE // self.block_d // (1 if alignment(self.width) >= 8 else 2)  # fewer where loads are narrow

    def table_bytes(self, heads: int) -> int:
        """Bytes of angles and spans that programs of so many heads in each row read."""
        spans = 0 if self.spans is None else nbytes(self.spans)
        return heads * (self.batch * nbytes(self.cos, self.sin) + spans)

    def cost(self, sizes: Tiles, heads: int, reads: Sequence[Tensor], writes: Sequence[Tensor], products: int) -> Cost:
        """Of blocks of tokens that read `reads` once and the ends before them, for so many matrix products.

        Programs for so many `heads` in each row read the tables.
        """
        ends, pairs = self.ends_read(sizes)
        each = self.batch * self.heads * self.width
        read = nbytes(*reads) + 2 * each * ends * self.k.element_size() + self.table_bytes(heads)
        return Cost(read, nbytes(*writes), 2 * products * each * pairs)

    def ends_read(self, sizes: Tiles) -> tuple[int, int]:
        """(ends read, tokens times ends multiplied) by all blocks of tokens of one head and row."""
        if self.spans is None:
            return tiles.ends_read(self.length, self.chunk_size, sizes)
        blocks = triton.cdiv(self.length, sizes.tokens)  # how many are seen stands on the GPU: at most all
        return blocks * self.ends, blocks * sizes.tokens * triton.cdiv(self.ends, sizes.ends) * sizes.ends

    def tokens_read(self, sizes: Tiles) -> int:
        """Tokens read by all tiles of ends of one head and row."""
        if self.spans is None:
            return tiles.tokens_read(self.length, self.chunk_size, sizes)
        return triton.cdiv(self.ends, sizes.ends) * self.length  # at most


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor | None,
    end_values: Tensor | None,
    spans: Tensor | None,
    chunk_size: int,
    rope_base: float,
) -> Call:
    """Copy what lies unsuitably, find the regular ends and turn their keys."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    if end_keys is None or end_values is None:
        keys, values = (x[:, chunk_size - 1 :: chunk_size] for x in (k, v))
    else:
        keys, values = rows_of(end_keys), rows_of(end_values)
    cos = sin = torch.empty(0, dtype=torch.float32, device=q.device)
    if rope_base:
        chunks = torch.arange(keys.shape[1] + 1, device=q.device)
        cos, sin = angles(chunks, q.shape[-1], rope_base, torch.float32)
    call = Call(q, k, v, keys, values, spans, cos, sin, chunk_size, bool(rope_base))
    return call._replace(keys=_turned_ends(call)) if rope_base and spans is None and call.ends else call


def _turned_ends(call: Call) -> Tensor:
    """The regular ends' keys, turned by their chunk; in memory (B, H, E, d), but (B, E, H, d) as they are read."""
    out = call.keys.new_empty(call.batch, call.heads, call.ends, call.width).transpose(1, 2)
    programs = call.batch * call.heads
    launch(
        kernels.turn_ends,
        (triton.cdiv(call.ends, call.plain_rows) * programs,),
        call.keys,
        call.cos,
        call.sin,
        out,
        call.batch,
        call.ends,
        call.heads,
        *call.keys.stride()[:3],
        *out.stride()[:3],
        cost=Cost(nbytes(call.keys) + programs * nbytes(call.cos, call.sin), nbytes(out), 3 * out.numel()),
        ALIGN=alignment(call.width),
        WIDTH=call.width,
        BLOCK_D=call.block_d,
        BLOCK_N=call.plain_rows,
    )
    return out


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors, each element once."""
    return sum(x.numel() * x.element_size() for x in tensors)
