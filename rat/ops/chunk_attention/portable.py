"""Chunk attention in PyTorch: blocked matrix products, no (T x C) mask, with a backward of its own.

All L queries of a chunk see the same chunk ends, so attention over them is grouped-query causal attention with L
queries for each key: a block of whole chunks is one dense matrix product against the ends before it, and only the
square of the block's own chunks needs a (constant) mask. The own term is one more column of the same softmax. The
block of logits stays in cache; the backward recomputes it instead of keeping it. Queries are rotated block by
block too, so the op stores nothing but its inputs.

The loops are opaque to torch.compile (a custom op with a fake).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rat.ops.chunk_attention.ends import Ends, regular_ends
from rat.ops.rotary.portable import angles, turn

# Logits of one block: 4 MiB in fp32 stay in cache between the passes of a softmax.
BLOCK_LOGITS = 1 << 20
# Fewer rows starve the matrix product; more of them multiply what the mask then hides.
FEWEST_ROWS, MOST_ROWS = 64, 512


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Ends | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """As the reference."""
    regular = ends is None
    if ends is None:
        ends = regular_ends(k, v, chunk, chunk_size, rope_base, "portable")
    keys, values = (x.transpose(1, 2).contiguous() for x in ends[:2])
    span = (chunk[:1], chunk[:1]) if regular else (ends.first, ends.last)
    places = chunk[:1] if regular else chunk
    return _attend_op(q, k, v, keys, values, places, *span, chunk_size, rope_base or 0.0, regular)


class _Call(NamedTuple):
    """The inputs of one call, with heads as (tiles, groups): head h = tile * G + group."""

    q: Tensor  # (B, T, G, d)
    k: Tensor  # (B, T, H, d)
    v: Tensor  # (B, T, H, d)
    end_keys: Tensor  # (B * H, E, d)
    end_values: Tensor  # (B * H, E, d)
    chunk: Tensor  # (B or 1, T)
    first: Tensor
    last: Tensor
    chunk_size: int
    rope_base: float
    regular: bool

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def tiled(self, x: Tensor) -> Tensor:
        """(B, R, H, d) -> (B, R, tiles, G, d)."""
        return x.unflatten(2, (-1, self.q.shape[2]))

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows to take together, and how many ends the last of them may see."""
        length, step = self.q.shape[1], self.chunk_size
        heads, ends = self.end_keys.shape[:2]
        budget = BLOCK_LOGITS // heads
        start = 0
        while start < length:
            if self.regular:  # the largest R with R * (start + R) / L logits in the budget, in whole chunks
                rows = int((start * start + 4 * step * budget) ** 0.5 - start) // 2
                rows = max(1, min(max(FEWEST_ROWS, rows), MOST_ROWS) // step) * step
            else:
                rows = max(FEWEST_ROWS, budget // (ends + 1))
            stop = min(length, start + rows)
            yield slice(start, stop), min(ends, (stop - 1) // step) if self.regular else ends
            start = stop


def _call(*args: Any) -> _Call:
    call = _Call(*args)
    return call._replace(end_keys=call.end_keys.flatten(0, 1), end_values=call.end_values.flatten(0, 1))


def _heads_first(x: Tensor) -> Tensor:
    """(B, R, H, d) -> (B * H, R, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _mask(call: _Call, rows: slice, seen: int) -> tuple[int, Tensor]:
    """Which ends a block's rows may not see, as (column from which on the mask counts, bool (B or 1, R, n))."""
    start = rows.start // call.chunk_size if call.regular else 0
    slots = torch.arange(start, seen, device=call.q.device)
    if call.regular:
        return start, slots >= call.chunk[:, rows, None]
    return start, (slots < call.first[:, rows, None]) | (slots >= call.last[:, rows, None])


def _angles(call: _Call, rows: slice) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a block's rows, (B or 1, R, 1, d / 2)."""
    width, dtype = call.q.shape[-1], call.q.dtype
    if not call.regular:
        return angles(call.chunk[:, rows], width, call.rope_base, dtype)
    # once for each chunk, not for each of its tokens
    chunks = call.chunk[:, rows.start : rows.stop : call.chunk_size]
    count = rows.stop - rows.start
    cos, sin = angles(chunks, width, call.rope_base, dtype)
    return tuple(x.repeat_interleave(call.chunk_size, 1)[:, :count] for x in (cos, sin))  # type: ignore[return-value]


def _queries(call: _Call, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A block's queries, rotated, scaled and tiled over the heads: (B * H, R, d); and the (scaled) angles."""
    q = call.q[:, rows]
    turned = None
    if call.rope_base:
        cos, sin = _angles(call, rows)
        turned = cos * call.scale, sin * call.scale
    q = q * call.scale if turned is None else turn(q, *turned)
    batch, length, groups, width = q.shape
    tiles = call.k.shape[2] // groups
    q = q.transpose(1, 2)[:, None]
    return q.expand(batch, tiles, groups, length, width).reshape(-1, length, width), turned


def _probabilities(call: _Call, rows: slice, seen: int, queries: Tensor) -> Tensor:
    """Softmax over the `seen` ends, the own term (column `seen`) and empty columns: (B * H, R, >= seen + 1)."""
    batch, _, heads, _ = call.k.shape
    width = math.ceil((seen + 1) / 16) * 16
    logits = queries.new_empty(batch * heads, queries.shape[1], width)
    torch.bmm(queries, call.end_keys[:, :seen].mT, out=logits[..., :seen])
    by_row = logits.unflatten(0, (batch, heads))
    start, hidden = _mask(call, rows, seen)
    by_row[..., start:seen].masked_fill_(hidden[:, None], -math.inf)
    own = (call.tiled(call.k[:, rows]) * call.q[:, rows, None]).sum(-1).flatten(2)
    by_row[..., seen] = own.mT * call.scale
    logits[..., seen + 1 :] = -math.inf
    return logits.softmax(-1)


@torch.library.custom_op("rat::chunk_attention", mutates_args=())
def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    chunk: Tensor,
    first: Tensor,
    last: Tensor,
    chunk_size: int,
    rope_base: float,
    regular: bool,
) -> Tensor:
    call = _call(q, k, v, end_keys, end_values, chunk, first, last, chunk_size, rope_base, regular)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for rows, seen in call.blocks():
        if not seen:
            out[:, rows] = v[:, rows]
            continue
        queries, _ = _queries(call, rows)
        p = _probabilities(call, rows, seen, queries)
        own = _heads_first(v[:, rows]) * p[..., seen, None]
        block = torch.baddbmm(own, p[..., :seen], call.end_values[:, :seen])
        out[:, rows] = block.unflatten(0, (-1, v.shape[2])).transpose(1, 2)
    return out


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


class _Grads(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    end_keys: Tensor  # (B * H, E, d), fp32
    end_values: Tensor


def _block_backward(call: _Call, rows: slice, seen: int, grad: Tensor, into: _Grads) -> None:
    """Write the gradients of a block's rows and add its share to those of the ends."""
    queries, turned = _queries(call, rows)
    p = _probabilities(call, rows, seen, queries)
    keys, values = call.end_keys[:, :seen], call.end_values[:, :seen]
    grad_out = _heads_first(grad[:, rows])
    grad_p = torch.zeros_like(p) if p.shape[-1] > seen + 1 else torch.empty_like(p)
    torch.bmm(grad_out, values.mT, out=grad_p[..., :seen])
    grad_p[..., seen] = (grad_out * _heads_first(call.v[:, rows])).sum(-1)
    grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
    into.end_values[:, :seen] += torch.bmm(p[..., :seen].mT, grad_out)
    into.end_keys[:, :seen] += torch.bmm(grad_s[..., :seen].mT, queries)
    batch, _, heads, _ = call.k.shape
    groups = call.q.shape[2]
    grad_q = torch.bmm(grad_s[..., :seen], keys).unflatten(0, (batch, -1, groups)).sum(1).transpose(1, 2)
    grad_q = grad_q * call.scale if turned is None else turn(grad_q, turned[0], -turned[1])
    own_p, own_s = (
        x[..., seen].unflatten(0, (batch, heads)).mT[..., None] * f for x, f in ((p, 1.0), (grad_s, call.scale))
    )
    torch.mul(grad[:, rows], own_p, out=into.v[:, rows])
    own_s = call.tiled(own_s)
    torch.mul(call.q[:, rows, None], own_s, out=call.tiled(into.k[:, rows]))
    into.q[:, rows] = (call.tiled(call.k[:, rows]) * own_s).sum(2).add_(grad_q)


@torch.library.custom_op("rat::chunk_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    chunk: Tensor,
    first: Tensor,
    last: Tensor,
    chunk_size: int,
    rope_base: float,
    regular: bool,
) -> list[Tensor]:
    call = _call(q, k, v, end_keys, end_values, chunk, first, last, chunk_size, rope_base, regular)
    wide = torch.promote_types(q.dtype, torch.float32)
    into = _Grads(
        *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)),
        *(torch.zeros_like(x, dtype=wide) for x in (call.end_keys, call.end_values)),
    )
    for rows, seen in call.blocks():
        if seen:
            _block_backward(call, rows, seen, grad, into)
        else:
            into.q[:, rows], into.k[:, rows], into.v[:, rows] = 0, 0, grad[:, rows]
    keys, values = (g.view(x.shape).to(x.dtype) for g, x in ((into.end_keys, end_keys), (into.end_values, end_values)))
    return [into.q, into.k, into.v, keys, values]


@_backward_op.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:5]]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return (*_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None)


_attend_op.register_autograd(_backward, setup_context=_setup_context)
