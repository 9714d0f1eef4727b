"""The output gate on the CPU kernels of `native.cpp`."""

import ctypes

import torch
from torch import Tensor

from rat.ops import native
from rat.ops.output_gate import portable

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


def output_gate(gate_logits: Tensor, x: Tensor) -> Tensor:
    """As the reference."""
    if not native.supports(gate_logits, x):
        return portable.output_gate(gate_logits, x)
    return _gate_op(gate_logits, x)


def _rows(z: Tensor) -> Tensor:
    """(B, T, D) whose rows are evenly spaced and in one piece, copied if they are not."""
    batch, length, _ = z.shape
    even = z.stride(2) == 1 and (batch == 1 or length == 1 or z.stride(0) == length * z.stride(1))
    return z if even else z.contiguous()


def _row_distance(z: Tensor) -> int:
    return z.stride(1) if z.shape[1] > 1 else z.stride(0)


def _shape(x: Tensor) -> tuple[ctypes.c_int64, ...]:
    return _I64(x.shape[0] * x.shape[1]), _I64(x.shape[2]), _I64(native.threads(x.numel()))


def _at(x: Tensor) -> ctypes.c_void_p:
    return _POINTER(x.data_ptr())


@torch.library.custom_op("rat::native_output_gate", mutates_args=())
def _gate_op(z: Tensor, x: Tensor) -> Tensor:
    z, x = _rows(z), x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    native.call("output_gate", x.dtype, *_shape(x), _at(z), _I64(_row_distance(z)), _at(x), _at(out))
    return out


@_gate_op.register_fake
def _(z: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("rat::native_output_gate_backward", mutates_args=())
def _backward_op(grad: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    z, x, grad = _rows(z), x.contiguous(), grad.contiguous()
    grads = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    places = _at(grad), _at(z), _I64(_row_distance(z)), _at(x), *(_at(g) for g in grads)
    native.call("output_gate_backward", x.dtype, *_shape(x), *places)
    return grads


@_backward_op.register_fake
def _(grad: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return _backward_op(grad, *ctx.saved_tensors)


_gate_op.register_autograd(_backward, setup_context=_setup_context)
