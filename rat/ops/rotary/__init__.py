"""Rotary position embedding."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, select

_IMPLEMENTATIONS = implementations(__name__, "rotary")


def rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0, backend: Backend | None = None) -> Tensor:
    """Turn each head's vectors by their position (RoPE, arXiv 2104.09864; first half paired with the second).

    Args:
        x: (B, T, heads, d), d even.
        positions: integers, (T,) or (B, T); tokens or chunks, as the caller counts.
        base: the longest wavelength is about 2 pi * base.

    Returns:
        A tensor of x's shape and dtype.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotary needs (B, T, heads, an even d), got {tuple(x.shape)}")
    if positions.shape not in ((x.shape[1],), x.shape[:2]):
        raise ValueError(f"positions {tuple(positions.shape)} fit neither (T,) nor (B, T) of {tuple(x.shape)}")
    run = select(_IMPLEMENTATIONS, backend, x)
    return run(x, positions, base)
