"""Chunk attention in Triton: the own term inside the same online softmax, all tokens of a chunk on shared key tiles.

Nothing is kept for the backward but inputs, output and log-sum-exp. In rows of one document the ends are read from k
and v where they lie, a token every L, and their gradients are added there; only the keys, turned by their chunk, are
written out anew (1 / L of k). With documents or given ends each token has a span of ends.

Moved must be every input once and every output once. By count the launches move more: each block of tokens reads the
ends before it, and each tile of ends the tokens after it, as in any flash attention. What is read again lies in the
level-two cache as a rule: all heads of a block stand side by side, so that a group's queries come from memory once,
and the ends of all heads, 2 T D / L numbers for each row, are small. Memory itself sees more in the backward, where
three launches read the output's gradient, which keeps own terms, queries and ends out of each other's registers, and
fp32 sums of the ends' gradients are written and read.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rat.ops.chunk_attention import backward_kernels, kernels, tiles
from rat.ops.chunk_attention.call import Call, alignment, nbytes, prepare, rows_of
from rat.ops.chunk_attention.ends import Ends
from rat.ops.launch import Cost, capability, launch

WIDEST = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Programs that the ends' gradients should at least have: two for each multiprocessor of the GPUs meant. A constant, so
# that sums are taken in the same order on all of them. A share of the tokens is not made shorter than this.
PROGRAMS, SHORTEST_SHARE = 256, 512
LOG2_E = math.log2(math.e)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Ends | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """As the reference; bf16, fp16 or fp32 and heads of at most 256 channels."""
    kinds = {x.dtype for x in (q, k, v, *(() if ends is None else ends[:2]))}
    if len(kinds) > 1 or q.dtype not in DTYPES:
        found = ", ".join(sorted(str(kind) for kind in kinds))
        raise ValueError(f"triton chunk attention takes one dtype of bf16, fp16 and fp32, got {found}: choose portable")
    if q.shape[-1] > WIDEST:
        raise ValueError(
            f"triton chunk attention takes heads of at most {WIDEST} channels, got {q.shape[-1]}: choose portable"
        )
    keys, values, spans = None, None, None
    if ends is not None:
        keys, values = ends[:2]
        # Clamped, so that no kernel reads past the ends whatever a caller says of them.
        spans = torch.stack([chunk, ends.first, ends.last]).clamp(max=keys.shape[1]).int()
    out, _ = _forward_op(q, k, v, keys, values, spans, chunk_size, rope_base or 0.0)
    return out


@torch.library.custom_op("rat::triton_chunk_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor | None,
    end_values: Tensor | None,
    spans: Tensor | None,
    chunk_size: int,
    rope_base: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, d) and the log-sum-exp (B, H, T) in base 2."""
    call = prepare(q, k, v, end_keys, end_values, spans, chunk_size, rope_base)
    out, lse = _outputs(v)
    sizes = tiles.forward_tiles(call.width, q.dtype, capability(q.device))
    launch(
        kernels.forward,
        (triton.cdiv(call.length, sizes.tokens) * call.batch * call.heads,),
        *(call.q, call.k, call.v, call.keys, call.values, *call.tables, out, lse),
        *(*call.sizes, call.scale * LOG2_E),
        *(stride for x in (call.q, call.k, call.v, call.keys, call.values) for stride in x.stride()[:3]),
        # every head reads its group's queries, as many bytes as its keys
        cost=call.cost(sizes, call.heads, reads=(call.k, call.k, call.v), writes=(out, lse), products=2),
        ROTARY=call.rotary,
        **call.tiled(sizes),
    )
    return out, lse


def _outputs(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return out, torch.empty(batch, heads, length, dtype=torch.float32, device=v.device)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(v)


@torch.library.custom_op("rat::triton_chunk_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor | None,
    end_values: Tensor | None,
    spans: Tensor | None,
    out: Tensor,
    lse: Tensor,
    chunk_size: int,
    rope_base: float,
) -> list[Tensor]:
    """The gradients of q, k, v, and of the given ends' keys and values."""
    call = prepare(q, k, v, end_keys, end_values, spans, chunk_size, rope_base)
    grads = _gradients(q, k, v, end_keys, end_values)
    above = _Above(rows_of(grad), out, lse, torch.empty_like(lse))
    turned = _own_terms(call, above, grads)
    if call.ends:
        _query_gradient(call, above, turned, grads[0])
        sums = _end_sums(call, above, turned)
        _bring_home(call, sums, *grads[-2:])
    return grads


def _gradients(*inputs: Tensor | None) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs if x is not None]


@_backward_op.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return _gradients(*inputs[:5])


class _Above(NamedTuple):
    """What the backward knows of the output."""

    grad: Tensor  # (B, T, H, d)
    out: Tensor  # (B, T, H, d)
    lse: Tensor  # (B, H, T), base 2
    delta: Tensor  # (B, H, T), the sum of grad * out over a head's channels; written by `_own_terms`


def _own_terms(call: Call, above: _Above, grads: list[Tensor]) -> Tensor:
    """Write delta and the own terms of the gradients of q, k and v; return the turned queries, (B, T, G, d)."""
    turned = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device) if call.rotary else call.q
    written = (above.delta, *grads[:3], *([turned] if call.rotary else []))
    read = (call.q, call.k, call.v, *above[:3])
    launch(
        backward_kernels.backward_own,
        (triton.cdiv(call.length, call.plain_rows) * call.batch * call.groups,),
        *(call.q, call.k, call.v, *call.tables, above.out, above.lse, above.grad, turned, above.delta, *grads[:3]),
        *(*call.sizes, call.scale, call.scale * LOG2_E),
        *(stride for x in (call.q, call.k, call.v, above.grad) for stride in x.stride()[:3]),
        cost=Cost(nbytes(*read) + call.table_bytes(call.groups), nbytes(*written), 12 * call.k.numel()),
        ROTARY=call.rotary,
        BLOCK_M=call.plain_rows,
        **call.constants,
    )
    return turned


def _query_gradient(call: Call, above: _Above, turned: Tensor, grad_q: Tensor) -> None:
    """Add what the ends do to the queries' gradient."""
    sizes = tiles.query_tiles(call.width, call.q.dtype, capability(call.q.device))
    launch(
        backward_kernels.backward_queries,
        (triton.cdiv(call.length, sizes.tokens) * call.batch * call.groups,),
        *(turned, call.keys, call.values, *call.tables, above.lse, above.grad, above.delta, grad_q),
        *(*call.sizes, call.scale, call.scale * LOG2_E),
        *(stride for x in (turned, above.grad, call.keys, call.values) for stride in x.stride()[:3]),
        cost=call.cost(
            sizes,
            call.groups,
            reads=(turned, grad_q, above.grad, above.lse, above.delta),
            writes=(grad_q,),
            products=3,
        ),
        ROTARY=call.rotary,
        **call.tiled(sizes),
    )


def _end_sums(call: Call, above: _Above, turned: Tensor) -> Tensor:
    """What each share of the tokens does to the ends' keys and values: fp32 (2, shares, B, H, E, d)."""
    sizes = tiles.end_tiles(call.width, call.q.dtype, capability(call.q.device))
    programs = triton.cdiv(call.ends, sizes.ends) * call.batch * call.heads
    shares = max(1, min(PROGRAMS // programs, call.length // SHORTEST_SHARE))
    sums = above.lse.new_empty(2, shares, call.batch, call.heads, call.ends, call.width)
    ranges = call.cos if call.spans is None else _ranges(call.spans, call.ends, sizes.ends)
    tokens = call.tokens_read(sizes) * call.batch * call.heads
    read = tokens * (2 * call.width * turned.element_size() + 2 * above.lse.element_size())
    read += shares * nbytes(call.keys, call.values)
    launch(
        backward_kernels.backward_ends,
        (programs * shares,),
        *(turned, call.keys, call.values, call.tables[2], ranges, above.lse, above.grad, above.delta, sums),
        *(*call.sizes, call.ends, shares, call.scale * LOG2_E),
        *(stride for x in (turned, above.grad, call.keys, call.values) for stride in x.stride()[:3]),
        cost=Cost(read, nbytes(sums), 8 * tokens * sizes.ends * call.width),
        **call.tiled(sizes),
    )
    return sums


def _ranges(spans: Tensor, ends: int, tile: int) -> Tensor:
    """The first and one past the last token that sees a tile of ends, int32 (2, B, tiles): spans never fall."""
    starts = torch.arange(0, ends, tile, dtype=torch.int32, device=spans.device).expand(spans.shape[1], -1).contiguous()
    low = torch.searchsorted(spans[2], starts, right=True, out_int32=True)
    return torch.stack([low, torch.searchsorted(spans[1], starts + tile, out_int32=True)])


def _bring_home(call: Call, sums: Tensor, grad_keys: Tensor, grad_values: Tensor) -> None:
    """Add the sums to the gradients of the tokens that were ends, or write those of given ends."""
    regular = call.spans is None
    if regular:
        grad_keys, grad_values = (x[:, call.chunk_size - 1 :: call.chunk_size] for x in (grad_keys, grad_values))
    moved = nbytes(grad_keys, grad_values)
    launch(
        backward_kernels.bring_home,
        (triton.cdiv(call.ends, call.plain_rows) * call.batch * call.heads,),
        *(sums, call.cos, call.sin, grad_keys, grad_values),
        *(call.batch, call.heads, call.ends, sums.shape[1], call.scale, *grad_keys.stride()[:2]),
        cost=Cost(nbytes(sums) + regular * moved, moved, sums.numel() + 4 * grad_keys.numel()),
        ADD=regular,
        ROTARY=regular and call.rotary,
        ALIGN=alignment(call.width),
        WIDTH=call.width,
        BLOCK_D=call.block_d,
        BLOCK_N=call.plain_rows,
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * (8 - len(grads)))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
