"""The projections of a layer."""

from torch import Tensor, nn

from rat.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` without a bias, by the kernel backend that is chosen."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight)
