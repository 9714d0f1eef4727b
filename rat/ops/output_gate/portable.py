"""The output gate in PyTorch, with a backward that computes the gate again instead of keeping it."""

from typing import Any

import torch
from torch import Tensor


def output_gate(gate_logits: Tensor, x: Tensor) -> Tensor:
    """As the reference, in the precision of its inputs."""
    return _OutputGate.apply(gate_logits, x)


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate_logits, x)
        return torch.sigmoid(gate_logits).to(x.dtype).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_logits, x = ctx.saved_tensors
        gate = torch.sigmoid(gate_logits)
        return torch.ops.aten.sigmoid_backward(grad * x, gate), grad * gate
