"""The gated recurrence in Triton: gate, bias, sigmoid and the scan of two streams in one pass, with its backward.

The logits are read once for both streams and no gate is ever stored. Rows are cut into spans of tokens, one program
each. Where every chunk starts from an empty state, a span is one or more whole chunks and one launch does it all.
Otherwise a first launch finds what each span does to the state that enters it, a second hands the states from span
to span, and a third writes the outputs; the backward does the same from right to left.

Only inputs and outputs are saved. The backward needs s_t - y_t, and takes it as g (s_{t-1} - y_t) from the outputs,
which are the states as rounded once: no difference of close numbers, so that a nearly shut gate loses nothing. States
in fp32 would have to be kept for a whole span in registers, or cost a second reading of the inputs, which are as many
bytes as the outputs. The bias gets its gradient in parts, one for each span, and no number is added by atomics.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rat.ops.gated_scan import kernels
from rat.ops.launch import Cost, launch

# Tokens that a program walks: where states are handed over, and at least (in whole chunks) where chunks are regular.
SPAN = 64
SHORTEST_SPAN = 32
# Channels of a program, all tiles together: 8 for each thread, 16 bytes of a bf16 tensor. More than MANY_TILES leave a
# thread too few registers for 8 (sm_100 spilled with 64 tiles), and get twice as many threads.
CHANNELS = 1024
NUM_WARPS = 4
MANY_TILES = 32
# Tokens in flight, the one at work included.
STAGES = 3
# Channels of one warp that hands states over, and spans in flight: with little to compute, it waits for memory only.
HAND_OVER_CHANNELS = 128
HAND_OVER_STAGES = 8
# A program holds all tiles of at least so many channels, 32 bytes in bf16, which is what memory hands out. A stream
# that is tiled more often than MOST_TILES is repeated in memory instead.
FEWEST_CHANNELS = 16
MOST_TILES = 64
# Operations per token and channel, where exp and division count as one: the gate, a state, a state's gradient.
GATE_FLOPS, STATE_FLOPS, GRADIENT_FLOPS = 5, 3, 8


def gated_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    restart: Tensor | None,
    frozen: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As the reference."""
    return scan(gate_logits, streams, gate_bias, initial_state, _flags(restart, frozen), 0)


def scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    flags: Tensor | None,
    chunk_size: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The gated scan; a `chunk_size` above 0 says that every so many tokens the state starts from zero.

    Then there are neither initial states nor `flags`, which are (B, T) int8 and those of `kernels`.
    """
    width = gate_logits.shape[-1]
    streams = [y if width // y.shape[-1] <= MOST_TILES else y.repeat(1, 1, width // y.shape[-1]) for y in streams]
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for group in _groups([y.shape[-1] for y in streams], width):
        initial = None if initial_state is None else torch.stack([initial_state[i] for i in group], dim=1)
        *out, last = _scan_op(gate_logits, [streams[i] for i in group], gate_bias, initial, flags, chunk_size)
        outputs += out
        finals += last.unbind(1)
    return tuple(outputs), tuple(finals)


def _groups(widths: list[int], width: int) -> Iterator[list[int]]:
    """Neighbouring streams that one launch can take: one or two, with at most one width below the gate's."""
    i = 0
    while i < len(widths):
        pair = set(widths[i : i + 2]) - {width}
        size = 2 if i + 1 < len(widths) and len(pair) <= 1 else 1
        yield list(range(i, i + size))
        i += size


def _flags(restart: Tensor | None, frozen: Tensor | None) -> Tensor | None:
    """What each token does to the state before it, in the numbers of `kernels`; a frozen token does not restart."""
    flags = None if restart is None else restart * kernels.EMPTIES.value
    if frozen is not None:
        skips = frozen * kernels.SKIPS.value
        flags = skips if flags is None else torch.where(frozen, skips, flags)
    return None if flags is None else flags.to(torch.int8)


def _rows(x: Tensor) -> Tensor:
    """(B, T, D) as (B T, D) whose channels lie side by side: a view wherever that can be one."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One tensor for each stream that the kernels name."""
    return tensors[0], tensors[-1]


def _size(*tensors: Tensor) -> int:
    """In bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


class _Call(NamedTuple):
    """One call of the kernels: its inputs as rows of tokens, and how they are cut."""

    batch: int
    length: int
    width: int
    logits: Tensor
    streams: list[Tensor]
    bias: Tensor | None
    flags: Tensor | None
    chunk_size: int

    @property
    def span(self) -> int:
        """Tokens that a program walks."""
        return self.chunk_size * max(1, SHORTEST_SPAN // self.chunk_size) if self.chunk_size else SPAN

    @property
    def spans(self) -> int:
        """Programs along a row."""
        return -(-self.length // self.span)

    def empty(self, *shape: int) -> Tensor:
        """For states and sums."""
        return self.logits.new_empty(shape, dtype=_wide(self.logits))

    def walk(
        self,
        kernel: Any,
        streams: list[Tensor],
        *between: Tensor,
        more: Sequence[Tensor] = (),
        cost: Cost,
        **constants: Any,
    ) -> None:
        """Launch a kernel over all spans, on the logits, these streams, what lies between, and all the strides.

        `cost` is that of the streams and the rest, without the logits, the gate, the bias and the flags. What the
        kernels name and a call lacks is never read: some tensor stands in its place.
        """
        narrow = min(y.shape[-1] for y in self.streams)
        tile = triton.next_power_of_2(self.width // narrow)
        block = min(triton.next_power_of_2(narrow), max(FEWEST_CHANNELS, CHANNELS // tile))
        blocks, programs = triton.cdiv(narrow, block), self.batch * self.spans
        read = cost.bytes_read + _size(self.logits)
        read += 0 if self.bias is None else programs * _size(self.bias)
        read += 0 if self.flags is None else blocks * _size(self.flags)
        launch(
            kernel,
            (programs * blocks,),
            self.logits,
            self.logits if self.bias is None else self.bias,
            self.logits if self.flags is None else self.flags,
            *_two(streams),
            *between,
            self.length,
            self.spans,
            *(x.stride(0) for x in (self.logits, *_two(streams), *more)),
            cost=Cost(read, cost.bytes_written, cost.flops + GATE_FLOPS * self.logits.numel()),
            num_warps=NUM_WARPS if tile <= MANY_TILES else 2 * NUM_WARPS,
            num_stages=STAGES,
            WIDTH=narrow,
            TILES=self.width // narrow,
            STREAMS=len(streams),
            NARROW_0=streams[0].shape[-1] < self.width,
            NARROW_1=streams[-1].shape[-1] < self.width,
            SPAN=self.span,
            BIAS=self.bias is not None,
            FLAGS=self.flags is not None,
            ROWS=tile,
            BLOCK=block,
            STAGES=STAGES,
            **constants,
        )

    def enter(self, first: Tensor, streams: list[Tensor], reverse: bool) -> Tensor:
        """What enters each span, (B, spans, streams, D), where `first` (B, streams, D) enters the first.

        With `reverse` these are the gradients that enter from the right, and `streams` those of the outputs.
        """
        if self.spans == 1:
            return first
        increments = self.empty(self.batch, self.spans, len(streams), self.width)
        products = self.empty(self.batch, self.spans, self.width)
        cost = Cost(_size(*streams), _size(increments, products), self.flops(STATE_FLOPS) + self.logits.numel())
        self.walk(kernels.span_summary, streams, increments, products, cost=cost, REVERSE=reverse)
        entries = torch.empty_like(increments)
        block = min(triton.next_power_of_2(self.width), HAND_OVER_CHANNELS)
        launch(
            kernels.hand_over,
            (self.batch * triton.cdiv(self.width, block),),
            first,
            increments,
            products,
            entries,
            self.spans,
            cost=Cost(_size(first, increments, products), _size(entries), 2 * entries.numel()),
            num_warps=1,
            num_stages=HAND_OVER_STAGES,
            D=self.width,
            STREAMS=len(streams),
            BLOCK=block,
            STAGES=HAND_OVER_STAGES,
            REVERSE=reverse,
        )
        return entries

    def flops(self, each: int) -> int:
        """Of as many operations for each state."""
        return each * len(self.streams) * self.logits.numel()


def _call(logits: Tensor, streams: list[Tensor], bias: Tensor | None, flags: Tensor | None, chunk_size: int) -> _Call:
    batch, length, width = logits.shape
    return _Call(
        batch,
        length,
        width,
        _rows(logits),
        [_rows(y) for y in streams],
        None if bias is None else bias.contiguous(),
        None if flags is None else flags.contiguous(),
        chunk_size,
    )


@torch.library.custom_op("rat::triton_scan", mutates_args=())
def _scan_op(
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    initial: Tensor | None,
    flags: Tensor | None,
    chunk_size: int,
) -> list[Tensor]:
    call = _call(logits, streams, bias, flags, chunk_size)
    outputs, finals = _results(logits, streams)
    entries = finals if chunk_size else call.enter(_initial(finals, initial), call.streams, False)
    cost = Cost(
        _size(*call.streams) + (0 if chunk_size else _size(entries)),
        _size(*outputs, finals),
        call.flops(STATE_FLOPS),
    )
    kernel = kernels.scan_forward
    call.walk(kernel, call.streams, entries, *_two(outputs), finals, cost=cost, CHUNK=chunk_size)
    return [*outputs, finals]


def _results(logits: Tensor, streams: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Room for the states at every token and for those after the last one, (B, streams, D)."""
    batch, _, width = logits.shape
    outputs = [torch.empty(logits.shape, dtype=y.dtype, device=y.device) for y in streams]
    return outputs, logits.new_empty(batch, len(streams), width, dtype=_wide(logits))


def _initial(like: Tensor, initial: Tensor | None) -> Tensor:
    return torch.zeros_like(like) if initial is None else initial.to(like.dtype).contiguous()


@_scan_op.register_fake
def _(logits: Tensor, streams: list[Tensor], *rest: Any) -> list[Tensor]:
    outputs, finals = _results(logits, streams)
    return [*outputs, finals]


@torch.library.custom_op("rat::triton_scan_backward", mutates_args=())
def _scan_backward_op(
    gradients: list[Tensor],
    grad_finals: Tensor,
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    initial: Tensor | None,
    flags: Tensor | None,
    outputs: list[Tensor],
    chunk_size: int,
) -> list[Tensor]:
    call = _call(logits, streams, bias, flags, chunk_size)
    above = [_rows(g) for g in gradients]
    grad_finals = grad_finals.contiguous()
    entering = grad_finals if chunk_size else call.enter(grad_finals, above, True)
    grad_logits, *grad_streams = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (logits, *streams))
    first = _initial(grad_finals, initial)
    grad_initial = torch.empty_like(first)
    parts = first if bias is None else call.empty(call.batch * call.spans, call.width)
    # At the first token of a chunk, or of a row, no output before it is read.
    starts = triton.cdiv(call.length, chunk_size) if chunk_size else 1
    cost = Cost(
        _size(*call.streams, *above, entering)
        + _size(*outputs) // call.length * (call.length - starts)
        + (0 if chunk_size else _size(first)),
        _size(grad_logits, *grad_streams)
        + (0 if bias is None else _size(parts))
        + (0 if chunk_size else _size(grad_initial)),
        call.flops(GRADIENT_FLOPS) + call.logits.numel(),
    )
    between = first, *_two(outputs), *_two(above), entering, grad_logits, *_two(grad_streams), parts, grad_initial
    call.walk(kernels.scan_backward, call.streams, *between, more=_two(above), cost=cost, CHUNK=chunk_size)
    extra = [None if bias is None else parts.sum(0), None if initial is None else grad_initial]
    return [grad_logits, *grad_streams, *(x for x in extra if x is not None)]


@_scan_backward_op.register_fake
def _(
    gradients: list[Tensor],
    grad_finals: Tensor,
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    initial: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (logits, *streams)]
    shapes = [None if bias is None else logits.shape[-1:], None if initial is None else grad_finals.shape]
    return grads + [logits.new_empty(shape, dtype=grad_finals.dtype) for shape in shapes if shape is not None]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, streams, bias, initial, flags, ctx.chunk_size = inputs
    ctx.num_streams = len(streams)
    ctx.optional = [x is not None for x in (bias, initial, flags)]
    present = [x for x in (bias, initial, flags) if x is not None]
    ctx.save_for_backward(logits, *streams, *output[:-1], *present)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    saved = iter(ctx.saved_tensors)
    n = ctx.num_streams
    logits = next(saved)
    streams = [next(saved) for _ in range(n)]
    outputs = [next(saved) for _ in range(n)]
    bias, initial, flags = (next(saved) if present else None for present in ctx.optional)
    *gradients, grad_finals = grads
    grad_logits, *rest = _scan_backward_op(
        gradients, grad_finals, logits, streams, bias, initial, flags, outputs, ctx.chunk_size
    )
    extra = iter(rest[n:])
    grad_bias, grad_initial = (None if x is None else next(extra).to(x.dtype) for x in (bias, initial))
    return grad_logits, rest[:n], grad_bias, grad_initial, None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)
