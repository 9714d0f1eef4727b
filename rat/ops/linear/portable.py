"""The product by PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, in the precision of its inputs."""
    return F.linear(x, weight)
