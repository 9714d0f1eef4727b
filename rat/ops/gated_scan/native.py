"""The gated linear recurrence on the CPU kernels of `native.cpp`: one pass forward, one backward, nothing else kept.

The loops are opaque to torch.compile (a custom op with a fake).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rat.ops import native
from rat.ops.gated_scan import portable

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


def gated_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    restart: Tensor | None,
    frozen: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As the reference."""
    run = scan if has_kernels(gate_logits, streams) else portable.scan
    return run(gate_logits, streams, gate_bias, initial_state, restart, frozen, 0)


def has_kernels(gate_logits: Tensor, streams: Sequence[Tensor]) -> bool:
    """Whether `scan` takes these: in fp32 or bf16, all as wide as the gate or of one narrower width."""
    narrow = {y.shape[-1] for y in streams} - {gate_logits.shape[-1]}
    return len(narrow) <= 1 and native.supports(gate_logits, *streams)


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
    flags = None
    if restart is not None or frozen is not None:
        masks = [m.to(torch.uint8) * bit for m, bit in ((restart, 1), (frozen, 2)) if m is not None]
        flags = sum(masks[1:], masks[0]).contiguous()
    states = [] if initial_state is None else [s.float().contiguous() for s in initial_state]
    bias = None if gate_bias is None else gate_bias.float().contiguous()
    results = _scan_op(gate_logits, list(streams), bias, states, flags, chunk_size)
    return tuple(results[: len(streams)]), tuple(results[len(streams) :])


class _Call(ctypes.Structure):
    """`Call` of native.cpp."""

    _fields_ = (
        *((name, _I64) for name in ("batch", "length", "width", "narrow", "num_streams", "chunk_size", "num_threads")),
        *((name, _POINTER) for name in ("flags", "bias")),
        *((name, native.Strided) for name in ("logits", "grad_logits")),
        *((name, _POINTER) for name in ("y", "y_width", "out", "grad_out", "grad_y")),
        *((name, _POINTER) for name in ("initial", "last", "grad_last", "grad_bias")),
    )


def _array(kind: Any, items: Sequence[Any]) -> ctypes.Array[Any]:
    return (kind * len(items))(*items)


def _call(
    logits: Tensor,
    streams: Sequence[Tensor],
    bias: Tensor | None,
    flags: Tensor | None,
    chunk_size: int,
    per_token: dict[str, list[Tensor]],
    per_row: dict[str, list[Tensor]],
) -> _Call:
    """The arguments of both directions; lists of (B, T, D) become arrays of views, those of (B, D) of pointers."""
    batch, length, width = logits.shape
    call = _Call(
        batch=batch,
        length=length,
        width=width,
        narrow=min(y.shape[-1] for y in streams),
        num_streams=len(streams),
        chunk_size=chunk_size,
        num_threads=native.threads(logits.numel()),
        flags=native.pointer(flags),
        bias=native.pointer(bias),
        logits=native.strided(logits),
    )
    arrays = {"y_width": _array(_I64, [y.shape[-1] for y in streams])}
    for name, xs in {"y": streams, **per_token}.items():
        arrays[name] = _array(native.Strided, [native.strided(x) for x in xs])
    for name, xs in per_row.items():
        if xs:
            arrays[name] = _array(_POINTER, [x.data_ptr() for x in xs])
    call.arrays = arrays  # type: ignore[attr-defined]  # kept alive as long as the call
    for name, array in arrays.items():
        setattr(call, name, ctypes.addressof(array))
    return call


@torch.library.custom_op("rat::native_scan", mutates_args=())
def _scan_op(
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    flags: Tensor | None,
    chunk_size: int,
) -> list[Tensor]:
    logits, streams = native.packed(logits), [native.packed(y) for y in streams]
    outputs = [torch.empty(logits.shape, dtype=logits.dtype) for _ in streams]
    last = [torch.empty(logits.shape[0], logits.shape[2], dtype=torch.float32) for _ in streams]
    call = _call(logits, streams, bias, flags, chunk_size, {"out": outputs}, {"initial": states, "last": last})
    native.call("scan_forward", logits.dtype, ctypes.byref(call))
    return outputs + last


@_scan_op.register_fake
def _(logits: Tensor, streams: list[Tensor], *rest: Any) -> list[Tensor]:
    outputs = [torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) for _ in streams]
    return outputs + [logits.new_empty(logits.shape[0], logits.shape[2], dtype=torch.float32) for _ in streams]


@torch.library.custom_op("rat::native_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_outputs: list[Tensor],
    grad_last: list[Tensor],
    logits: Tensor,
    streams: list[Tensor],
    bias: Tensor | None,
    states: list[Tensor],
    flags: Tensor | None,
    outputs: list[Tensor],
    chunk_size: int,
) -> list[Tensor]:
    logits, *streams = (native.packed(x) for x in (logits, *streams))
    grad_outputs = [native.packed(x) for x in grad_outputs]
    grad_last = [x.contiguous() for x in grad_last]
    grad_logits, *grad_streams = (torch.empty(x.shape, dtype=x.dtype) for x in (logits, *streams))
    grad_states = [torch.empty(x.shape, dtype=x.dtype) for x in grad_last]
    per_token = {"out": outputs, "grad_out": grad_outputs, "grad_y": grad_streams}
    per_row = {"initial": states, "last": grad_states, "grad_last": grad_last}
    call = _call(logits, streams, bias, flags, chunk_size, per_token, per_row)
    call.grad_logits = native.strided(grad_logits)
    num_parts = native.library().rat_scan_parts(ctypes.byref(call))
    parts = torch.zeros(num_parts, logits.shape[2], dtype=torch.float32)
    call.grad_bias = parts.data_ptr()
    native.call("scan_backward", logits.dtype, ctypes.byref(call))
    return [grad_logits, *grad_streams, parts.sum(0), *grad_states]


@_scan_backward_op.register_fake
def _(
    grad_outputs: list[Tensor], grad_last: list[Tensor], logits: Tensor, streams: list[Tensor], *rest: Any
) -> list[Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (logits, *streams)]
    bias = logits.new_empty(logits.shape[2], dtype=torch.float32)
    return [*grads, bias, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in grad_last)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, streams, bias, states, flags, ctx.chunk_size = inputs
    ctx.num_streams, ctx.num_states = len(streams), len(states)
    ctx.optional = [x is not None for x in (bias, flags)]
    present = [x for x in (bias, flags) if x is not None]
    ctx.save_for_backward(logits, *streams, *output[: len(streams)], *states, *present)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    saved = iter(ctx.saved_tensors)
    n = ctx.num_streams
    logits = next(saved)
    streams, outputs, states = ([next(saved) for _ in range(k)] for k in (n, n, ctx.num_states))
    bias, flags = (next(saved) if present else None for present in ctx.optional)
    grad_logits, *rest = _scan_backward_op(
        list(grads[:n]), list(grads[n:]), logits, streams, bias, states, flags, outputs, ctx.chunk_size
    )
    grad_bias = rest[n] if bias is not None else None
    return grad_logits, rest[:n], grad_bias, rest[n + 1 :] if states else [], None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)
