"""Metrics that count tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """The mean of losses over the tokens that they were taken on, of all devices; 0 where no token counts.

    torchmetrics' own MeanMetric forgets the weights where its check for NaN, which waits for the device, is off.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor) -> None:
        """Count a micro batch: its mean loss, and over how many tokens."""
        self.total += loss.double() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The loss per token, fp64."""
        return self.total / self.tokens.clamp(min=1)
