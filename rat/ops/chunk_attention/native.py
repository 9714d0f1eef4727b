"""Chunk attention on a CPU: PyTorch's matrix products, and between them one pass each of `native.cpp`.

All L queries of a chunk see the same chunk ends, so a block of tokens is one dense matrix product against the ends
before it, a head at a time, whose logits stay in cache. The backward computes them again; the output and the
log-sum-exp are all that is kept. Where every row is one document, the ends are read from k and v, and their gradients
go straight into those of k and v.

The loops are opaque to torch.compile (a custom op with a fake).
"""

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rat.ops import native
from rat.ops.chunk_attention import portable
from rat.ops.chunk_attention.ends import Ends
from rat.ops.rotary.portable import angles, turn

# Logits of a block and head, which stay in cache between the passes over them.
BLOCK_BYTES = 1 << 22
# Fewer rows starve the matrix product; more of them multiply what the causal order then hides.
FEWEST_ROWS, MOST_ROWS = 64, 512

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


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
    if not native.supports(q, k, v):
        return portable.chunk_attention(q, k, v, ends, chunk, chunk_size, rope_base)
    if ends is None:
        return _attend_op(q, k, v, None, None, None, None, chunk, chunk_size, rope_base or 0.0)[0]
    keys, values = (x.transpose(1, 2).to(q.dtype).contiguous() for x in ends[:2])
    return _attend_op(q, k, v, keys, values, ends.first, ends.last, chunk, chunk_size, rope_base or 0.0)[0]


class _Block(ctypes.Structure):
    """`Block` of native.cpp."""

    _fields_ = (
        *((n, _I64) for n in ("batch", "heads", "groups", "width", "start", "rows", "seen", "length", "num_threads")),
        ("scale", ctypes.c_float),
        *((n, _POINTER) for n in ("first", "last", "place", "cos", "sin")),
        *((n, native.Strided) for n in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        *((n, _POINTER) for n in ("log_sum_exp", "own", "delta")),
        *((n, _POINTER) for n in ("queries", "block_out", "block_grad", "logits", "grad_logits")),
    )


class _Call:
    """One call of the operation: its inputs as the kernels want them, and memory that its blocks share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        end_keys: Tensor | None,
        end_values: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        chunk: Tensor,
        chunk_size: int,
        rope_base: float,
    ) -> None:
        self.q, self.k, self.v = (native.packed(x) for x in (q, k, v))
        self.chunk_size, self.regular = chunk_size, end_keys is None
        self.chunk, self.tables = chunk.to(torch.int32).contiguous(), None
        if rope_base:
            indices = torch.arange(int(chunk.max()) + 1)
            self.tables = tuple(x[:, 0].contiguous() for x in angles(indices, q.shape[3], rope_base, torch.float32))
        if end_keys is None or end_values is None:
            end_keys, end_values = self._read_ends()
            self.first, self.last = torch.zeros_like(self.chunk), self.chunk
        else:
            assert first is not None
            assert last is not None
            last = last.clamp(0, end_keys.shape[2])  # the kernels trust it
            self.first, self.last = (x.to(torch.int32).contiguous() for x in (first, last))
        self.end_keys, self.end_values = end_keys.flatten(0, 1), end_values.flatten(0, 1)
        self.blocks = list(self._blocks())
        self.most_rows = max((rows.stop - rows.start for rows, _ in self.blocks), default=0)
        self.most_logits = max(((rows.stop - rows.start) * seen for rows, seen in self.blocks), default=0)
        self.memory: dict[str, Tensor] = {}

    def _read_ends(self) -> tuple[Tensor, Tensor]:
        """The last tokens of all chunks, (B, H, E, d); keys are rotated."""
        size = self.chunk_size
        keys, values = self.k[:, size - 1 :: size], self.v[:, size - 1 :: size]
        if self.tables is not None:
            keys = turn(keys, *(x[: keys.shape[1], None] for x in self.tables))
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()

    def write_back_ends(self, keys: Tensor, values: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add the gradients of the ends, fp32 (B * H, E, d), to those of the tokens they were read from."""
        size, batch = self.chunk_size, self.k.shape[0]
        keys, values = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (keys, values))
        if self.tables is not None:
            cos, sin = (x[: keys.shape[1], None] for x in self.tables)
            keys = turn(keys, cos, -sin)
        grad_k[:, size - 1 :: size] += keys
        grad_v[:, size - 1 :: size] += values

    def _blocks(self) -> Iterator[tuple[slice, int]]:
        """Tokens to take together, and how many ends the last of them may see."""
        length, step = self.q.shape[1], self.chunk_size
        ends, budget = self.end_keys.shape[1], BLOCK_BYTES // self.q.element_size()
        start = 0
        while start < length:
            rows = max(FEWEST_ROWS, budget // (ends + 1))
            if self.regular:  # the largest R whose R * (start + R) / L logits are within the budget
                most = int((start * start + 4 * step * budget) ** 0.5 - start) // 2
                rows = max(1, min(max(FEWEST_ROWS, most), MOST_ROWS) // step) * step
            stop = min(length, start + rows)
            yield slice(start, stop), min(ends, (stop - 1) // step) if self.regular else ends
            start = stop

    def scratch(self, name: str, dtype: torch.dtype, most: int, *shape: int) -> Tensor:
        """Memory that all blocks share, so that it is in cache by then; no block needs more than `most` elements."""
        if name not in self.memory:
            self.memory[name] = torch.empty(most, dtype=dtype)
        return self.memory[name][: math.prod(shape)].view(shape)

    def block(self, rows: slice, seen: int, **tensors: Tensor) -> "_Work":
        """A block of tokens, ready for the kernels."""
        return _Work(self, rows, seen, tensors)


class _Work:
    """A block and the tensors that its kernels and matrix products share, head-major."""

    def __init__(self, call: _Call, rows: slice, seen: int, tensors: dict[str, Tensor]) -> None:
        batch, length, groups, width = call.q.shape
        heads, dtype, count = call.k.shape[2], call.q.dtype, rows.stop - rows.start
        self.call, self.dtype, self.seen = call, dtype, seen
        tokens = batch * heads * call.most_rows
        self.queries, self.block_out, self.block_grad = (
            call.scratch(name, dtype, tokens * width, batch * heads, count, width)
            for name in ("queries", "block_out", "block_grad")
        )
        self.logits, self.grad_logits = (
            call.scratch(name, dtype, call.most_logits, count, seen) for name in ("logits", "grad_logits")
        )
        own, delta = (call.scratch(name, torch.float32, tokens, batch * heads, count) for name in ("own", "delta"))
        tables = call.tables or (None, None)
        threads = native.threads(count * (batch * heads * width + seen))
        inside = {"queries": self.queries, "block_out": self.block_out, "block_grad": self.block_grad}
        inside |= {"logits": self.logits, "grad_logits": self.grad_logits, "own": own, "delta": delta}
        self.struct = _Block(
            *(batch, heads, groups, width, rows.start, count, seen, length, threads, width**-0.5),
            *(native.pointer(x) for x in (call.first, call.last, call.chunk, *tables)),
            **{name: native.strided(x) for name, x in (("q", call.q), ("k", call.k), ("v", call.v))},
            **{name: native.strided(x) for name, x in tensors.items() if name != "log_sum_exp"},
            **{name: x.data_ptr() for name, x in inside.items()},
            log_sum_exp=tensors["log_sum_exp"].data_ptr(),
        )

    def run(self, kernel: str, *head: ctypes.c_int64) -> None:
        """One of the passes of native.cpp over this block, or over one head (row of the batch, head) of it."""
        native.call(f"chunk_{kernel}", self.dtype, ctypes.byref(self.struct), *head)

    def heads(self) -> Iterator[tuple[int, tuple[ctypes.c_int64, ctypes.c_int64]]]:
        """Places along the axis B * H, and what the kernels call them."""
        for i in range(len(self.queries)):
            b, h = divmod(i, self.call.k.shape[2])
            yield i, (_I64(b), _I64(h))

    def attend(self) -> None:
        """The values of the ends, weighted, into `block_out`."""
        keys, values = self.call.end_keys[:, : self.seen], self.call.end_values[:, : self.seen]
        for i, head in self.heads():
            torch.mm(self.queries[i], keys[i].mT, out=self.logits)
            self.run("softmax", *head)
            torch.mm(self.logits, values[i], out=self.block_out[i])

    def attend_back(self, of_keys: Tensor, of_values: Tensor) -> None:
        """The gradients of the queries into `block_out`; those of the ends, fp32 (B * H, E, d), are added to."""
        keys, values = self.call.end_keys[:, : self.seen], self.call.end_values[:, : self.seen]
        for i, head in self.heads():
            torch.mm(self.queries[i], keys[i].mT, out=self.logits)
            torch.mm(self.block_grad[i], values[i].mT, out=self.grad_logits)
            self.run("softmax_back", *head)
            _accumulate(of_values[i, : self.seen], self.logits, self.block_grad[i])
            _accumulate(of_keys[i, : self.seen], self.grad_logits, self.queries[i])
            torch.mm(self.grad_logits, keys[i], out=self.block_out[i])


@torch.library.custom_op("rat::native_chunk_attention", mutates_args=())
def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor | None,
    end_values: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float,
) -> tuple[Tensor, Tensor]:
    call = _Call(q, k, v, end_keys, end_values, first, last, chunk, chunk_size, rope_base)
    out = torch.empty(v.shape, dtype=v.dtype)
    log_sum_exp = torch.empty(v.shape[0], v.shape[2], v.shape[1], dtype=torch.float32)
    for rows, seen in call.blocks:
        block = call.block(rows, seen, out=out, log_sum_exp=log_sum_exp)
        block.run("ask")
        block.attend()
        block.run("answer")
    return out, log_sum_exp


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return out, torch.empty(v.shape[0], v.shape[2], v.shape[1], dtype=torch.float32, device=v.device)


@torch.library.custom_op("rat::native_chunk_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_keys: Tensor | None,
    end_values: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float,
) -> list[Tensor]:
    call = _Call(q, k, v, end_keys, end_values, first, last, chunk, chunk_size, rope_base)
    grads = {f"grad_{name}": torch.empty(x.shape, dtype=x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    of_keys, of_values = (torch.zeros(call.end_keys.shape, dtype=torch.float32) for _ in range(2))
    tensors = {"grad": native.packed(grad), "out": out, "log_sum_exp": log_sum_exp, **grads}
    for rows, seen in call.blocks:
        block = call.block(rows, seen, **tensors)
        block.run("ask_back")
        block.attend_back(of_keys, of_values)
        block.run("answer_back")
    if end_keys is not None and end_values is not None:
        ends = [g.view(x.shape).to(x.dtype) for g, x in ((of_keys, end_keys), (of_values, end_values))]
        return [*grads.values(), *ends]
    call.write_back_ends(of_keys, of_values, grads["grad_k"], grads["grad_v"])
    return list(grads.values())


def _accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a^T b, in fp32."""
    if a.dtype == into.dtype:
        into.addmm_(a.mT, b)
    else:
        into += a.mT @ b


@_backward_op.register_fake
def _(grad: Tensor, out: Tensor, log_sum_exp: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:5] if x is not None]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, chunk_size, rope_base = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.options = chunk_size, rope_base
    ctx.save_for_backward(*output, *(x for x in tensors if x is not None))


def _backward(ctx, grad, grad_log_sum_exp):  # type: ignore[no-untyped-def]
    out, log_sum_exp, *saved = ctx.saved_tensors
    rest = iter(saved)
    inputs = [next(rest) if present else None for present in ctx.present]
    grads = _backward_op(grad, out, log_sum_exp, *inputs, *ctx.options)
    return (*grads, *[None] * (10 - len(grads)))


_attend_op.register_autograd(_backward, setup_context=_setup_context)
