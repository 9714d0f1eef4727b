"""PyTorch's FlexAttention where every query sees one span of the keys: sliding windows, documents, chunk ends.

A query t sees the keys first_t <= j < last_t, and neither bound ever falls from one query to the next. So the tiles of
keys that a tile of queries needs are a span too, and those of them that need no mask: FlexAttention's tables of tiles
follow from the bounds of each tile's first and last query, without a mask of the size of T. They are so small that
every call makes them anew, inside the compiled graph.

One graph serves all lengths: sizes are symbols in it, and so are those of the tables, which is why the mask is made
inside. FlexAttention is compiled for GPUs; on a CPU its plain form runs, which writes all scores out and has no
backward pass: for checking.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

P = ParamSpec("P")
R = TypeVar("R")
Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Queries and keys of a tile that is visited or skipped as a whole: FlexAttention's own default.
TILE = 128
# Graphs of a function; PyTorch's own limit of 8 is less than dtypes, widths and sizes of 1 make together.
COMPILED_AT_MOST = 64


def compiled_on_gpus(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for tensors of a GPU, at its first call; its first argument is a tensor.

    It is compiled again for other dtypes, heads and head widths, and where a size is 1, or at most `TILE`, for the
    first time; but not because a length changed.
    """
    fast = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not getattr(args[0], "is_cuda", False) or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        for x in args:
            if isinstance(x, Tensor) and x.ndim == 4:
                torch._dynamo.mark_static(x, [2, 3])  # heads and their width, which decide the kernel
        with torch._dynamo.config.patch(recompile_limit=COMPILED_AT_MOST):
            return fast(*args, **kwargs)

    return run


def span_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its span of the keys.

    Args:
        q: (B, T, H, d).
        k: (B, N, H, d), N >= 1.
        v: (B, N, H, d).
        first: (B or 1, T) int64, the first key that a query sees; never falls along T.
        last: (B or 1, T) int64, one past the last key (more than N means N); never falls along T.

    Returns:
        (B, T, H, d), zeros where a query sees nothing, and the log-sum-exp of its logits, fp32 (B, T, H), -inf there.

    """
    batch, length = q.shape[:2]
    rows_first, rows_last = (x.expand(batch, length) for x in (first, last))

    def seen(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return (j >= rows_first[b, t]) & (j < rows_last[b, t])

    tables = tiles(first, last, k.shape[1])
    mask = BlockMask((length, k.shape[1]), *tables, (TILE, TILE), seen)
    # Not its kernel for fewer than 128 queries, which would be one more to compile.
    out, aux = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        kernel_options={"BACKEND": "TRITON"},
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def tiles(first: Tensor, last: Tensor, num_keys: int) -> Tables:
    """What FlexAttention wants to know of the tiles, as (how many, which) four times, int32.

    The tiles of keys that each tile of queries sees in part, (B, 1, M) and (B, 1, M, N), and in full; the tiles of
    queries that see each tile of keys in part, (B, 1, N) and (B, 1, N, M), and in full. M and N count tiles of T
    queries and `num_keys` keys. Only the first `how many` entries of `which` mean something.
    """
    length, last = first.shape[1], last.clamp(max=num_keys)
    columns = -(-num_keys // TILE)
    top = torch.arange(0, length, TILE, device=first.device)
    bottom = (top + TILE - 1).clamp(max=length - 1)
    start, stop = first[:, top] // TILE, -(-last[:, bottom] // TILE)
    stop = torch.maximum(start, stop)
    full_start, full_stop = -(-first[:, bottom] // TILE), last[:, top] // TILE
    along_keys = _partial_and_full(start, stop, full_start, full_stop, columns)
    # The bounds never fall, so the tiles of queries that see a tile of keys are a span as well: count what ends before
    # it, and what begins.
    key_tile = torch.arange(columns, device=first.device)[:, None]
    before_stop, before_start, before_full_stop, before_full_start = (
        (bound[:, None] <= key_tile).sum(-1) for bound in (stop, start, full_stop, full_start)
    )
    along_queries = _partial_and_full(before_stop, before_start, before_full_stop, before_full_start, len(top))
    return *along_keys, *along_queries


def _partial_and_full(
    start: Tensor, stop: Tensor, full_start: Tensor, full_stop: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and numbers of the tiles in [start, stop) outside [full_start, full_stop), then of those inside."""
    none_full = full_stop <= full_start
    full_start, full_stop = torch.where(none_full, start, full_start), torch.where(none_full, start, full_stop)
    place = torch.arange(width, device=start.device)
    before, full = full_start - start, full_stop - full_start
    partial_tile = torch.where(place < before[..., None], start[..., None], (start + full)[..., None]) + place
    full_tile = full_start[..., None] + place
    return (
        _table(stop - start - full),
        _table(partial_tile.clamp(max=width - 1)),
        _table(full),
        _table(full_tile.clamp(max=width - 1)),
    )


def _table(x: Tensor) -> Tensor:
    """(B, ...) -> (B, 1, ...) int32: the same for all heads."""
    return x[:, None].int().contiguous()
