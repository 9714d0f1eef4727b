"""Rotary embedding in PyTorch; its backward turns by the opposite angle and keeps no activation."""

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """As the reference."""
    return _Rotary.apply(x, *angles(positions, x.shape[-1], base, x.dtype))


def angles(positions: Tensor, d_head: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (..., 1, d_head / 2), with an axis of size 1 to broadcast over the heads.

    Angles are formed in fp64: in fp32 the position 100,000 would already be off by a hundredth of a turn.
    """
    half = d_head // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    turn = (positions[..., None].double() * frequencies).unsqueeze(-2)
    wide = torch.promote_types(dtype, torch.float32)
    return turn.cos().to(wide), turn.sin().to(wide)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., heads, d) by the given angles; computed in the angles' dtype, returned in x's."""
    first, second = x.chunk(2, dim=-1)
    if x.dtype == cos.dtype:  # without `out=` into a view, which torch.compile refuses
        out = (x.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)).flatten(-2)
        left, right = out.chunk(2, dim=-1)
        left.addcmul_(second, sin, value=-1)
        right.addcmul_(first, sin)
        return out
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = out.chunk(2, dim=-1)
    first, second = first.to(cos.dtype), second.to(cos.dtype)
    left.copy_((first * cos).addcmul_(second, sin, value=-1))
    right.copy_((first * sin).addcmul_(second, cos))
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None
