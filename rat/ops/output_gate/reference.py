"""The output gate as it is written."""

import torch
from torch import Tensor


def output_gate(gate_logits: Tensor, x: Tensor) -> Tensor:
    """sigmoid(z) x, in fp32 or wider; shapes as in the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.sigmoid(gate_logits.to(wide)) * x.to(wide)).to(x.dtype)
