"""Rotary embedding as a product with complex numbers (Su et al., arXiv 2104.09864; half-split pairs)."""

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn the pair (x_i, x_{i+d/2}) by the angle position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[..., None, None].double() * frequencies
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.complex(wide[..., :half], wide[..., half:])
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
