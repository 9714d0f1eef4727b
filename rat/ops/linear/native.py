"""The product by oneDNN, where that is faster: in fp32, for matrices that are not small.

PyTorch gives products in fp32 to MKL, and to oneDNN only those of compiled graphs. On two cores of an AMD EPYC,
oneDNN takes 0.3 to 0.6 of the time for a 6656 x 2048 matrix and up to 32 rows, and 0.9 of it for thousands of rows.
The gradient of the weight stays with MKL, which is the faster one where the longer axis is summed over.
"""

from typing import Any

import torch
from torch import Tensor

from rat.ops.backend import needs_gradient
from rat.ops.linear import portable

# Below, calling oneDNN costs more than it saves.
FEWEST_WEIGHTS = 1 << 18


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference."""
    if not _is_faster(x, weight):
        return portable.linear(x, weight)
    return _Linear.apply(x, weight) if needs_gradient(x, weight) else _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = _product(grad, weight.mT) if ctx.needs_input_grad[0] else None
        of_weight = grad.flatten(0, -2).mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if {x.dtype, weight.dtype} != {torch.float32} or x.ndim < 2:
        return False
    return weight.numel() >= FEWEST_WEIGHTS and x.numel() > 0
