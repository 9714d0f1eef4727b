"""How well a model predicts the further it is into a text, also beyond the length that it was trained on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rat.evaluation.answers import WITHIN
from rat.evaluation.scoring import TOKENS_AT_ONCE
from rat.model import CausalLM


class Span(NamedTuple):
    """Positions of a text and the loss there.

    Attributes:
        first: the first position; the token there is predicted from so many.
        last: the last one, which belongs to it.
        loss: mean over texts and positions, nats per token.
        within: distance to both ends of the 95 % confidence interval, by the spread over texts; None for one text.
    """

    first: int
    last: int
    loss: float
    within: float | None


@torch.inference_mode()
def loss_by_position(model: CausalLM, tokens: Tensor) -> Tensor:
    """The loss of every token but the first, given all before it: they are read in pieces, with the state carried.

    Args:
        model: in evaluation mode.
        tokens: (B, T + 1) int64, on its device.

    Returns:
        (B, T) fp32, nats per token, on the CPU; column t is of the token that is predicted from t + 1.
    """
    count, length = len(tokens), tokens.shape[1] - 1
    state = model.new_state(count, length)
    width = max(1, TOKENS_AT_ONCE // count)
    parts = []
    for start in range(0, length, width):
        stop = min(start + width, length)
        likelihood, _ = model.score(tokens[:, start:stop], tokens[:, start + 1 : stop + 1], state)
        parts.append(-likelihood.cpu())
    return torch.cat(parts, 1)


def spans(losses: Tensor, per_octave: int = 4) -> list[Span]:
    """The losses (N, T) of `loss_by_position` over spans of positions that grow by the same factor, the first being 1.

    Args:
        losses: N texts of the same length.
        per_octave: spans between two positions of which one is twice the other.

    Raises:
        ValueError: less than one an octave.
    """
    if per_octave < 1:
        raise ValueError(f"per_octave must be at least 1, got {per_octave}")
    length = losses.shape[1]
    octaves = math.ceil(math.log2(length)) if length > 1 else 0
    ends = {min(length, round(2 ** (i / per_octave))) for i in range(octaves * per_octave + 1)} | {length}
    found, first = [], 1
    for last in sorted(ends):
        found.append(span(losses, first, last))
        first = last + 1
    return found


def span(losses: Tensor, first: int, last: int) -> Span:
    """The losses (N, T) over the positions `first` to `last`, both included, from 1."""
    means = losses[:, first - 1 : last].double().mean(1)
    within = WITHIN * float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None
    return Span(first, last, float(means.mean()), within)
