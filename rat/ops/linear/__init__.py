"""The product of tokens and a weight matrix."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, select

_IMPLEMENTATIONS = implementations(__name__, "linear")


def linear(x: Tensor, weight: Tensor, *, backend: Backend | None = None) -> Tensor:
    """x W^T, `torch.nn.functional.linear` without a bias.

    It is an operation of its own because of decoding, where a few rows meet large matrices and PyTorch's product for
    fp32 on a CPU takes up to three times as long as another library's.

    Args:
        x: (..., D).
        weight: (O, D).

    Returns:
        (..., O).
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., D) and weight (O, D), got {tuple(x.shape)}, {tuple(weight.shape)}")
    return select(_IMPLEMENTATIONS, backend, x)(x, weight)
