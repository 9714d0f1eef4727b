"""How well each sequence of a batch is predicted."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rat.model import IGNORED


class Scores(NamedTuple):
    """Of S sequences: `nll` (S,) fp64, mean loss in nats; `tokens` (S,) int64, how many targets count; `right` (S,)
    int64, how many of them are the likeliest token. Of their N counted targets, row by row: `hits` (N,) bool, whether
    each is the likeliest token."""

    nll: Tensor
    tokens: Tensor
    right: Tensor
    hits: Tensor


def sequence_scores(logits: Tensor, labels: Tensor, document_ids: Tensor | None = None) -> Scores:
    """The scores of every row, or of every document of a row that has counted targets.

    Args:
        logits: (N, V) at the N places where a label counts, row by row, as `CausalLM` gives them.
        labels: (B, T) int64; -100 does not count.
        document_ids: (B, T) int64, or None where a row is one sequence.

    Returns:
        S = B scores, nll 0 where no label counts; with document_ids as many as there are pairs (row, document) with
        counted labels, sorted.
    """
    counted = labels != IGNORED
    targets, sequences, num = labels[counted], counted.nonzero()[:, 0], len(labels)
    if document_ids is not None:
        pairs = torch.stack([sequences, document_ids[counted]])
        found, sequences = torch.unique(pairs, dim=1, return_inverse=True)
        num = found.shape[1]
    nll = F.cross_entropy(logits.float(), targets, reduction="none").double()
    tokens = torch.bincount(sequences, minlength=num)
    hits = logits.argmax(-1) == targets
    right = torch.bincount(sequences[hits], minlength=num)
    return Scores(nll.new_zeros(num).index_add_(0, sequences, nll) / tokens.clamp(min=1), tokens, right, hits)
