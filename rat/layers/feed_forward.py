"""The feed-forward half of a block."""

from torch import Tensor, nn
from torch.nn import functional as F

from rat.layers.linear import Linear


class FeedForward(nn.Module):
    """D -> 4D, exact GELU, 4D -> D, without biases."""

    expansion = 4

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc1 = Linear(d_model, self.expansion * d_model)
        self.fc2 = Linear(self.expansion * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))

    def flops_per_token(self) -> int:
        """Forward FLOPs of a token: 16 D^2."""
        return 2 * (self.fc1.weight.numel() + self.fc2.weight.numel())
