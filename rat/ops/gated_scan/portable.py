"""The gated linear recurrence in PyTorch: blocks of tokens advance side by side, with a backward of its own.

A row of T tokens is cut into about sqrt(T) blocks. One walk over the tokens of all blocks at once finds what each
block does to the state that enters it (a product of gates and an increment), a short loop hands the states from
block to block, and a second walk writes the outputs. The backward is the same walk in reverse. The state is fp32
throughout, and the gate is recomputed from its logits where it is read, so none is ever stored.

The walks are opaque to torch.compile (a custom op with a fake), which would otherwise unroll them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def gated_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    restart: Tensor | None,
    frozen: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As the reference."""
    return scan(gate_logits, streams, gate_bias, initial_state, restart, frozen, 0)


def scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    restart: Tensor | None,
    frozen: Tensor | None,
    chunk_size: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The gated scan; a `chunk_size` above 0 says that every so many tokens the state starts from zero."""
    keep = None if restart is None else ~restart
    if keep is not None and frozen is not None:
        keep = keep | frozen
    states = [] if initial_state is None else list(initial_state)
    results = _scan_op(gate_logits, list(streams), gate_bias, states, keep, frozen, chunk_size)
    return tuple(results[: len(streams)]), tuple(results[len(streams) :])


class _Grid(NamedTuple):
    """A piece of the rows as `count` blocks of `length` tokens: views of shape (B, count, length, ...)."""

    logits: Tensor
    bias: Tensor | None
    streams: list[Tensor]
    keep: Tensor | None
    frozen: Tensor | None

    def gate(self, token: int) -> Tensor:
        logits = self.logits[:, :, token].to(_wide(self.logits))
        gate = torch.sigmoid(logits if self.bias is None else logits + self.bias)
        return gate if self.frozen is None else gate.masked_fill_(self.frozen[:, :, token, None], 1.0)

    def kept(self, state: Tensor, token: int) -> Tensor:
        return state if self.keep is None else state * self.keep[:, :, token, None]

    def tiled(self, stream: int, token: int) -> Tensor:
        """One token of a stream, widened to the state's dtype and with a size-1 axis to tile it over the gate."""
        return self.streams[stream][:, :, token, None].to(_wide(self.logits))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pieces(length: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(first token, number of blocks, tokens in a block): the full blocks, then what is left."""
    full, rest = divmod(length, block)
    if full:
        yield 0, full, block
    if rest:
        yield full * block, 1, rest


def _block_length(length: int, chunk_size: int) -> int:
    return chunk_size or min(length, 1 << max(3, round((length - 1).bit_length() / 2)))


def _cut(x: Tensor, piece: tuple[int, int, int]) -> Tensor:
    start, count, length = piece
    return x[:, start : start + count * length].unflatten(1, (count, length))


def _grid(
    piece: tuple[int, int, int],
    logits: Tensor,
    bias: Tensor | None,
    streams: list[Tensor],
    keep: Tensor | None,
    frozen: Tensor | None,
) -> _Grid:
    return _Grid(
        _cut(logits, piece),
        None if bias is None else bias.to(_wide(logits)),
        [_cut(y, piece) for y in streams],
        None if keep is None else _cut(keep, piece),
        None if frozen is None else _cut(frozen, piece),
    )


def _split(x: Tensor, y: Tensor) -> Tensor:
    """View the last axis of x as (tiles, width of y)."""
    return x.unflatten(-1, (-1, y.shape[-1]))


def _advance(grid: _Grid, states: list[Tensor], outputs: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
    """Walk the tokens of all blocks; return each block's last states and the product of its gates."""
    product = torch.ones_like(states[0]) if outputs is None else states[0]
    states = list(states)
    for token in range(grid.logits.shape[2]):
        gate = grid.gate(token)
        if outputs is None:
            product = grid.kept(product, token).mul_(gate) if grid.keep is not None else product.mul_(gate)
        for i, state in enumerate(states):
            y = grid.tiled(i, token)
            args = y, _split(grid.kept(state, token), y), _split(gate, y)
            if outputs is None:
                states[i] = torch.lerp(*args).flatten(-2)
            elif outputs[i].dtype == gate.dtype:
                states[i] = outputs[i][:, :, token]
                torch.lerp(*args, out=_split(states[i], y))
            else:
                states[i] = torch.lerp(*args).flatten(-2)
                outputs[i][:, :, token] = states[i]
    return states, product


def _hand_over(first: Tensor, increments: Tensor, products: Tensor) -> Tensor:
    """What enters each block: x_0 = first, x_{c+1} = increment_c + product_c * x_c; all (B, count, D)."""
    entries = [first]
    for c in range(increments.shape[1] - 1):
        entries.append(torch.addcmul(increments[:, c], products[:, c], entries[-1]))
    return torch.stack(entries, dim=1)


@torch.library.custom_op("rat::scan", mutates_args=())
def _scan_op(
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    keep: Tensor | None,
    frozen: Tensor | None,
    chunk_size: int,
) -> list[Tensor]:
    batch, length, width = logits.shape
    zeros = logits.new_zeros(batch, width, dtype=_wide(logits))
    current = [s.to(zeros.dtype) for s in states] or [zeros] * len(streams)
    outputs = [torch.empty(logits.shape, dtype=y.dtype, device=y.device) for y in streams]
    for piece in _pieces(length, _block_length(length, chunk_size)):
        grid = _grid(piece, logits, bias, streams, keep, frozen)
        count = piece[1]
        empty = [zeros[:, None].expand(-1, count, -1)] * len(streams)
        if chunk_size:
            entries = empty
        elif count == 1:
            entries = [s[:, None] for s in current]
        else:
            ends, product = _advance(grid, empty, None)
            entries = [_hand_over(s, end, product) for s, end in zip(current, ends, strict=True)]
        last, _ = _advance(grid, entries, [_cut(out, piece) for out in outputs])
        current = [s[:, -1] for s in last]
    return outputs + [s.to(zeros.dtype, copy=True) for s in current]


@_scan_op.register_fake
def _(
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    keep: Tensor | None,
    frozen: Tensor | None,
    chunk_size: int,
) -> list[Tensor]:
    batch, _, width = logits.shape
    outputs = [torch.empty(logits.shape, dtype=y.dtype, device=y.device) for y in streams]
    return outputs + [logits.new_empty(batch, width, dtype=_wide(logits)) for _ in streams]


def _retreat(
    grid: _Grid,
    grads: list[Tensor],
    carries: list[Tensor],
    before: list[Tensor | None],
    outputs: list[Tensor],
    into: tuple[Tensor, list[Tensor]],
) -> tuple[list[Tensor], Tensor]:
    """Walk the tokens of all blocks backwards and write the gradients of logits and streams.

    `carries` is the gradient that enters each block from the right, `before` the state that entered it from the
    left (None: zero). Returns what leaves each block to the left, and the gradient of the gate's bias (D,).
    """
    carries = list(carries)
    grad_bias = torch.zeros_like(carries[0][0, 0])
    for token in reversed(range(grid.logits.shape[2])):
        gate = grid.gate(token)
        open_ = 1 - gate
        grad_gate = torch.zeros_like(gate)
        for i, carry in enumerate(carries):
            y = grid.tiled(i, token)
            grad = carry + grads[i][:, :, token]
            previous = outputs[i][:, :, token - 1] if token else before[i]
            if previous is not None:
                grad_gate.addcmul_(grad, grid.kept(previous.to(grad.dtype), token))
            _split(grad_gate, y).sub_(_split(grad, y) * y)
            into[1][i][:, :, token] = _split(grad * open_, y).sum(2)
            carries[i] = grid.kept(grad.mul_(gate), token)
        grad_logits = grad_gate.mul_(gate).mul_(open_)
        into[0][:, :, token] = grad_logits
        grad_bias += grad_logits.sum((0, 1))
    return carries, grad_bias


def _carries_alone(grid: _Grid, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What each block sends to its left when nothing enters from the right, and the product of its gates."""
    carries = [torch.zeros_like(g[:, :, 0], dtype=_wide(g)) for g in grads]
    product = torch.ones_like(carries[0])
    for token in reversed(range(grid.logits.shape[2])):
        gate = grid.gate(token)
        product = grid.kept(product.mul_(gate), token)
        carries = [grid.kept((c + g[:, :, token]).mul_(gate), token) for c, g in zip(carries, grads, strict=True)]
    return carries, product


def _states_before(piece: tuple[int, int, int], output: Tensor, first: Tensor | None) -> Tensor:
    """The state that entered each block of a piece: (B, count, D)."""
    start, count, length = piece
    inner = output[:, start + length - 1 : start + (count - 1) * length : length]
    head = output[:, start - 1] if start else first
    head = torch.zeros_like(output[:, 0]) if head is None else head
    return torch.cat([head[:, None].to(_wide(output)), inner.to(_wide(output))], dim=1)


@torch.library.custom_op("rat::scan_backward", mutates_args=())
def _scan_backward_op(
    grad_outputs: list[Tensor],
    grad_finals: list[Tensor],
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    keep: Tensor | None,
    frozen: Tensor | None,
    outputs: list[Tensor],
    chunk_size: int,
) -> list[Tensor]:
    length = logits.shape[1]
    into = torch.empty_like(logits), [torch.empty_like(y) for y in streams]
    grad_bias = logits.new_zeros(logits.shape[-1], dtype=_wide(logits))
    entering = list(grad_finals)
    for piece in reversed(list(_pieces(length, _block_length(length, chunk_size)))):
        count = piece[1]
        grid = _grid(piece, logits, bias, streams, keep, frozen)
        grads = [_cut(g, piece) for g in grad_outputs]
        before: list[Tensor | None] = [None] * len(streams)
        if chunk_size:
            carries = [torch.cat([e.new_zeros(e.shape[0], count - 1, e.shape[1]), e[:, None]], 1) for e in entering]
        else:
            firsts: list[Tensor | None] = list(states) or [None] * len(streams)
            before = [_states_before(piece, o, s) for o, s in zip(outputs, firsts, strict=True)]
            carries = [e[:, None] for e in entering]
            if count > 1:
                alone, product = _carries_alone(grid, grads)
                flipped = product.flip(1)
                carries = [_hand_over(e, a.flip(1), flipped).flip(1) for e, a in zip(entering, alone, strict=True)]
        target = _cut(into[0], piece), [_cut(g, piece) for g in into[1]]
        leaving, piece_bias = _retreat(grid, grads, carries, before, [_cut(o, piece) for o in outputs], target)
        grad_bias += piece_bias
        entering = [torch.zeros_like(c[:, 0]) if chunk_size else c[:, 0] for c in leaving]
    return [into[0], *into[1], grad_bias, *(e.contiguous() for e in entering)]


@_scan_backward_op.register_fake
def _(
    grad_outputs: list[Tensor],
    grad_finals: list[Tensor],
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    keep: Tensor | None,
    frozen: Tensor | None,
    outputs: list[Tensor],
    chunk_size: int,
) -> list[Tensor]:
    grads = [torch.empty_like(x) for x in (logits, *streams)]
    grad_bias = logits.new_empty(logits.shape[-1], dtype=_wide(logits))
    return [*grads, grad_bias, *(torch.empty_like(g) for g in grad_finals)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, streams, bias, states, keep, frozen, ctx.chunk_size = inputs
    ctx.num_streams, ctx.num_states = len(streams), len(states)
    ctx.optional = [x is not None for x in (bias, keep, frozen)]
    present = [x for x in (bias, keep, frozen) if x is not None]
    ctx.save_for_backward(logits, *streams, *states, *output[: len(streams)], *present)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    saved = iter(ctx.saved_tensors)
    n = ctx.num_streams
    logits = next(saved)
    streams = [next(saved) for _ in range(n)]
    states = [next(saved) for _ in range(ctx.num_states)]
    outputs = [next(saved) for _ in range(n)]
    bias, keep, frozen = (next(saved) if present else None for present in ctx.optional)
    grad_logits, *rest = _scan_backward_op(
        list(grads[:n]), list(grads[n:]), logits, streams, bias, states, keep, frozen, outputs, ctx.chunk_size
    )
    grad_streams, grad_bias, grad_states = rest[:n], rest[n], rest[n + 1 :]
    return (
        grad_logits,
        grad_streams,
        None if bias is None else grad_bias.to(bias.dtype),
        grad_states if states else [],
        None,
        None,
        None,
    )


_scan_op.register_autograd(_backward, setup_context=_setup_context)
