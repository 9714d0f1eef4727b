"""The gated linear recurrence in PyTorch: blocks of tokens advance side by side, with a backward of its own.

A row of T tokens is cut into blocks. One walk over the tokens of all blocks at once finds what each
block does to the state that enters it (a product of gates and an increment), a short loop hands the states from
block to block, and a second walk writes the outputs. The backward is the same walk in reverse. The state is fp32
throughout, and the gate is recomputed from its logits where it is read, so none is ever stored.

The walks are opaque to torch.compile (a custom op with a fake), which would otherwise unroll them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


# Tokens in a block where no chunk says it: the walks take so many steps, the hand-over from block to block T / BLOCK.
BLOCK = 32
# Numbers in the part of a tensor that is worked on at a time: 4 MiB in fp32.
SLAB = 1 << 20


class _Grid(NamedTuple):
    """Some blocks of tokens side by side: views of shape (B, count, length, ...)."""

    logits: Tensor
    bias: Tensor | None
    streams: list[Tensor]
    keep: Tensor | None
    frozen: Tensor | None

    def gate(self) -> Tensor:
        """sigmoid(logits + bias) in the state's dtype; 1 where the state is frozen."""
        logits = self.logits.to(_wide(self.logits))
        gate = torch.sigmoid(logits if self.bias is None else logits + self.bias)
        return gate if self.frozen is None else gate.masked_fill_(self.frozen[..., None], 1.0)

    def decay(self, gate: Tensor) -> Tensor:
        """What is left of the state before: the gate, or nothing at a restart."""
        return gate if self.keep is None else gate * self.keep[..., None]

    def part(self, start: int, stop: int) -> "_Grid":
        """The blocks from `start` to `stop`."""
        cut = slice(start, stop)
        return _Grid(
            self.logits[:, cut],
            self.bias,
            [y[:, cut] for y in self.streams],
            None if self.keep is None else self.keep[:, cut],
            None if self.frozen is None else self.frozen[:, cut],
        )

    def slabs(self) -> Iterator[slice]:
        """Blocks whose tensors stay in cache between the passes over them."""
        batch, count, length, width = self.logits.shape
        step = max(1, SLAB // (batch * length * width))
        for start in range(0, count, step):
            yield slice(start, min(count, start + step))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _split(x: Tensor, y: Tensor) -> Tensor:
    """View the last axis of x as (tiles, width of y), to meet a stream that is tiled over the gate."""
    return x.unflatten(-1, (-1, y.shape[-1]))


def _pieces(length: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(first token, number of blocks, tokens in a block): the full blocks, then what is left."""
    full, rest = divmod(length, block)
    if full:
        yield 0, full, block
    if rest:
        yield full * block, 1, rest


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
    cut = [_cut(y, piece) for y in streams]
    if frozen is not None:
        frozen = _cut(frozen, piece)
        # a gate of 1 is no guard against what a padding may hold: 0 * NaN = NaN
        cut = [y.masked_fill(frozen[..., None], 0.0) for y in cut]
    return _Grid(
        _cut(logits, piece),
        None if bias is None else bias.to(_wide(logits)),
        cut,
        None if keep is None else _cut(keep, piece),
        frozen,
    )


def _hand_over(first: Tensor, increments: Tensor, products: Tensor) -> Tensor:
    """What enters each block: x_0 = first, x_{c+1} = increment_c + product_c * x_c; all (B, count, D)."""
    entries = [first]
    for c in range(increments.shape[1] - 1):
        entries.append(torch.addcmul(increments[:, c], products[:, c], entries[-1]))
    return torch.stack(entries, dim=1)


def _advance(grid: _Grid, states: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Walk the tokens of all blocks and write the outputs; return each block's last states (B, count, D)."""
    gate = grid.gate()
    for i, (y, out) in enumerate(zip(grid.streams, outputs, strict=True)):
        y = y.to(gate.dtype)[..., None, :]
        wide = out if out.dtype == gate.dtype else torch.empty_like(gate)
        state = states[i]
        for token in range(gate.shape[2]):
            if grid.keep is not None:
                state = state * grid.keep[:, :, token, None]
            start = y[:, :, token]
            target = wide[:, :, token]
            torch.lerp(start, _split(state, start), _split(gate[:, :, token], start), out=_split(target, start))
            state = target
        if wide is not out:
            out.copy_(wide)
        states[i] = state
    return states


def _increments(grid: _Grid) -> tuple[list[Tensor], Tensor]:
    """What each block does to the state that enters it: its increments (from zero) and the product of its gates."""
    gate = grid.gate()
    decay = grid.decay(gate)
    product = decay.prod(2)
    ends = []
    for y in grid.streams:
        inflow = (_split(1 - gate, y) * y[..., None, :]).flatten(-2)
        end = inflow[:, :, 0]
        for token in range(1, gate.shape[2]):
            end = torch.addcmul(inflow[:, :, token], decay[:, :, token], end)
        ends.append(end)
    return ends, product


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
    for piece in _pieces(length, chunk_size or BLOCK):
        grid = _grid(piece, logits, bias, streams, keep, frozen)
        targets = [_cut(out, piece) for out in outputs]
        entries = _entries(grid, current, chunk_size)
        for slab in grid.slabs():
            part = grid.part(slab.start, slab.stop)
            last = _advance(part, [e[:, slab] for e in entries], [t[:, slab] for t in targets])
            current = [s[:, -1] for s in last]
    return outputs + [s.to(zeros.dtype, copy=True) for s in current]


def _entries(grid: _Grid, current: list[Tensor], chunk_size: int) -> list[Tensor]:
    """The state that enters each block of a piece, (B, count, D) for each stream."""
    count = grid.logits.shape[1]
    if chunk_size:
        return [torch.zeros_like(s)[:, None].expand(-1, count, -1) for s in current]
    if count == 1:
        return [s[:, None] for s in current]
    parts = [_increments(grid.part(slab.start, slab.stop)) for slab in grid.slabs()]
    product = torch.cat([p for _, p in parts], dim=1)
    return [_hand_over(s, torch.cat([ends[i] for ends, _ in parts], dim=1), product) for i, s in enumerate(current)]


@_scan_op.register_fake
def _(logits: Tensor, streams: list[Tensor], *rest: Any) -> list[Tensor]:
    batch, _, width = logits.shape
    outputs = [torch.empty(logits.shape, dtype=y.dtype, device=y.device) for y in streams]
    return outputs + [logits.new_empty(batch, width, dtype=_wide(logits)) for _ in streams]


def _retreat(
    grid: _Grid,
    grads: list[Tensor],
    carries: list[Tensor],
    outputs: list[Tensor],
    into: tuple[Tensor, list[Tensor]],
) -> tuple[list[Tensor], Tensor]:
    """Walk the tokens of all blocks backwards and write the gradients of logits and streams.

    `carries` is the gradient that enters each block from the right. Returns what leaves each block to the left, and
    the gradient of the gate's bias (D,). With a = ds_t + (what the next token hands back), dy = a (1 - g) and, as
    g (s_{t-1} - y_t) = s_t - y_t, the logit's gradient is a (1 - g) (s_t - y_t): no state before is needed.
    """
    gate = grid.gate()
    decay = grid.decay(gate)
    grad_logits = torch.zeros_like(gate)
    leaving = []
    for i, (y, out) in enumerate(zip(grid.streams, outputs, strict=True)):
        total = torch.empty_like(gate)
        carry = carries[i]
        for token in reversed(range(gate.shape[2])):
            torch.add(grads[i][:, :, token], carry, out=total[:, :, token])
            carry = total[:, :, token] * decay[:, :, token]
        leaving.append(carry)
        inflow = total.addcmul_(total, gate, value=-1)
        change = _split(out.to(gate.dtype), y) - y[..., None, :]
        _split(grad_logits, y).addcmul_(_split(inflow, y), change)
        into[1][i].copy_(_split(inflow, y).sum(-2) if y.shape[-1] < gate.shape[-1] else inflow)
    into[0].copy_(grad_logits)
    return leaving, grad_logits.sum((0, 1, 2))


def _carries_alone(grid: _Grid, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What each block sends to its left when nothing enters from the right, and the product of its gates."""
    decay = grid.decay(grid.gate())
    carries = []
    for grad in grads:
        carry = grad[:, :, -1] * decay[:, :, -1]
        for token in reversed(range(decay.shape[2] - 1)):
            carry = (carry + grad[:, :, token]).mul_(decay[:, :, token])
        carries.append(carry)
    return carries, decay.prod(2)


def _entering_right(grid: _Grid, grads: list[Tensor], last: list[Tensor], chunk_size: int) -> list[Tensor]:
    """The gradient that enters each block of a piece from the right, (B, count, D) for each stream."""
    count = grid.logits.shape[1]
    if chunk_size:
        return [torch.cat([e.new_zeros(e.shape[0], count - 1, e.shape[1]), e[:, None]], 1) for e in last]
    if count == 1:
        return [e[:, None] for e in last]
    parts = [_carries_alone(grid.part(s.start, s.stop), [g[:, s] for g in grads]) for s in grid.slabs()]
    product = torch.cat([p for _, p in parts], dim=1).flip(1)
    return [
        _hand_over(e, torch.cat([alone[i] for alone, _ in parts], dim=1).flip(1), product).flip(1)
        for i, e in enumerate(last)
    ]


@torch.library.custom_op("rat::scan_backward", mutates_args=())
def _scan_backward_op(
    grad_outputs: list[Tensor],
    grad_finals: list[Tensor],
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    keep: Tensor | None,
    frozen: Tensor | None,
    outputs: list[Tensor],
    chunk_size: int,
) -> list[Tensor]:
    into = torch.empty_like(logits), [torch.empty_like(y) for y in streams]
    grad_bias = logits.new_zeros(logits.shape[-1], dtype=_wide(logits))
    entering = list(grad_finals)
    for piece in reversed(list(_pieces(logits.shape[1], chunk_size or BLOCK))):
        grid = _grid(piece, logits, bias, streams, keep, frozen)
        grads, states = ([_cut(x, piece) for x in xs] for xs in (grad_outputs, outputs))
        target, targets = _cut(into[0], piece), [_cut(g, piece) for g in into[1]]
        carries = _entering_right(grid, grads, entering, chunk_size)
        for slab in reversed(list(grid.slabs())):
            leaving, slab_bias = _retreat(
                grid.part(slab.start, slab.stop),
                [g[:, slab] for g in grads],
                [c[:, slab] for c in carries],
                [s[:, slab] for s in states],
                (target[:, slab], [t[:, slab] for t in targets]),
            )
            grad_bias += slab_bias
            entering = [torch.zeros_like(c[:, 0]) if chunk_size else c[:, 0] for c in leaving]
    return [into[0], *into[1], grad_bias, *(e.clone() for e in entering)]


@_scan_backward_op.register_fake
def _(
    grad_outputs: list[Tensor], grad_finals: list[Tensor], logits: Tensor, streams: list[Tensor], *rest: Any
) -> list[Tensor]:
    grads = [torch.empty_like(x) for x in (logits, *streams)]
    grad_bias = logits.new_empty(logits.shape[-1], dtype=_wide(logits))
    return [*grads, grad_bias, *(torch.empty_like(g) for g in grad_finals)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, streams, bias, states, keep, frozen, ctx.chunk_size = inputs
    ctx.num_streams, ctx.has_states = len(streams), bool(states)
    ctx.optional = [x is not None for x in (bias, keep, frozen)]
    present = [x for x in (bias, keep, frozen) if x is not None]
    ctx.save_for_backward(logits, *streams, *output[: len(streams)], *present)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    saved = iter(ctx.saved_tensors)
    n = ctx.num_streams
    logits = next(saved)
    streams = [next(saved) for _ in range(n)]
    outputs = [next(saved) for _ in range(n)]
    bias, keep, frozen = (next(saved) if present else None for present in ctx.optional)
    grad_logits, *rest = _scan_backward_op(
        list(grads[:n]), list(grads[n:]), logits, streams, bias, keep, frozen, outputs, ctx.chunk_size
    )
    grad_streams, grad_bias, grad_states = rest[:n], rest[n], rest[n + 1 :]
    return (
        grad_logits,
        grad_streams,
        None if bias is None else grad_bias.to(bias.dtype),
        grad_states if ctx.has_states else [],
        None,
        None,
        None,
    )


_scan_op.register_autograd(_backward, setup_context=_setup_context)
