"""Metrics that count tokens."""

from typing import Final

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


class HitsByOctave(Metric):
    """The share of hits among targets that a number tells apart, such as a distance: those of 1, of 2, of 3 to 4, of 5
    to 8 and so on, over all devices. Targets whose number is 0 belong to none of these.
    """

    full_state_update = False
    OCTAVES: Final = 32

    def __init__(self) -> None:
        super().__init__()
        for name in ("hits", "targets"):
            self.add_state(name, torch.zeros(self.OCTAVES, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, hits: Tensor, numbers: Tensor) -> None:
        """Count a micro batch.

        Args:
            hits: (N,) bool, whether each target is met.
            numbers: (N,) int64, its number, 0 or above.
        """
        octaves = torch.bucketize(numbers, 2 ** torch.arange(self.OCTAVES, device=numbers.device))
        told = numbers > 0
        self.targets += torch.bincount(octaves[told], minlength=self.OCTAVES)
        self.hits += torch.bincount(octaves[told & hits], minlength=self.OCTAVES)

    def compute(self) -> dict[int, Tensor]:
        """The share of each octave that has targets, by its largest number: 1, 2, 4, 8, ..."""
        return {2**i: self.hits[i] / self.targets[i] for i in self.targets.nonzero().flatten().tolist()}
