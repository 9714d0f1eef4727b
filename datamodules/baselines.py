"""What counting can do: n-gram perplexities that a language model has to beat to have learned more than
counts.

The counts are of the very (input, target) pairs that the model was trained on, the perplexities over the
pairs it is validated on, and both leave out the targets that its loss ignores.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules.dataset import IGNORED, make_batch
from datamodules.tokens import TokenDataModule

_CHUNK = 1 << 21
_DISCOUNTS = np.linspace(0.05, 1.0, 20)


class Pairs(NamedTuple):
    """Tokens and the tokens that followed them, (N,) int64 each; ignored targets are left out."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


class NgramBaselines(NamedTuple):
    """Perplexities over the validation pairs, and the discount at which the bigram's is lowest."""

    unigram: float
    bigram: float
    discount: float


def trained_pairs(datamodule: TokenDataModule, num_samples: int) -> Pairs:
    """The pairs of the first `num_samples` samples of a run, padding included, in the order it is trained on them.

    Give the DataModule the global_batch_size of the run (or its Trainer): it decides where an epoch ends.
    """
    dataset, order = datamodule.dataset("train"), datamodule.train_sampler()
    firsts = range(0, num_samples, order.samples_per_epoch)
    epochs = [
        order.samples(np.arange(min(order.samples_per_epoch, num_samples - first)), epoch)
        for epoch, first in enumerate(firsts)
    ]
    rows = max(1, _CHUNK // dataset.seq_len)
    samples = np.concatenate([np.empty(0, np.int64), *epochs])
    chunks = (samples[first : first + rows] for first in range(0, len(samples), rows))
    return collect_pairs(make_batch(dataset[chunk], dataset.eos_id) for chunk in chunks)


def validation_pairs(datamodule: TokenDataModule) -> Pairs:
    """The pairs of all validation samples."""
    return collect_pairs(datamodule.val_dataloader())


def collect_pairs(batches: Iterable[dict[str, Tensor]]) -> Pairs:
    """The pairs of `batches` as the model gets them (`input_ids` and `labels`, (B, T) int64 each)."""
    parts = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64))]
    for batch in batches:
        inputs, labels = batch["input_ids"].numpy().ravel(), batch["labels"].numpy().ravel()
        parts.append(Pairs(inputs[labels != IGNORED], labels[labels != IGNORED]))
    return Pairs(np.concatenate([part.inputs for part in parts]), np.concatenate([part.targets for part in parts]))


def ngram_baselines(train: Pairs, validation: Pairs, vocab_size: int) -> NgramBaselines:
    """Perplexities of a unigram and of an interpolated bigram model.

        unigram:   (c(y) + 1) / (N + V)
        bigram:    max(c(x, y) - d, 0) / c(x)  +  d n(x, .) / c(x) * (n(., y) + 1) / (n(., .) + V)

    with counts c of the N training pairs, and n how many different pairs there are; after a token x never
    seen, the last factor alone. This is interpolated Kneser-Ney smoothing, stronger (on the docstrings: 88)
    than Witten-Bell's (91) or one weight for all contexts (94). The discount d is the one of twenty that is
    best on the validation pairs themselves, which favours the baseline.

    Args:
        train: pairs to count.
        validation: pairs to predict.
        vocab_size: V.

    Raises:
        ValueError: no pairs on one side, or a token outside the vocabulary.
    """
    for name, pairs in (("training", train), ("validation", validation)):
        if not len(pairs.targets):
            raise ValueError(f"no {name} pairs: every target is ignored, or there are no samples")
        largest = max(int(pairs.inputs.max()), int(pairs.targets.max()))
        if largest >= vocab_size:
            raise ValueError(f"{name} token {largest} lies outside the vocabulary of {vocab_size}")
    unigram = (np.bincount(train.targets, minlength=vocab_size) + 1) / (len(train.targets) + vocab_size)
    keys, counts = np.unique(train.inputs * vocab_size + train.targets, return_counts=True)
    continuation = (np.bincount(keys % vocab_size, minlength=vocab_size) + 1) / (len(keys) + vocab_size)
    context = np.bincount(train.inputs, minlength=vocab_size)[validation.inputs]
    followers = np.bincount(keys // vocab_size, minlength=vocab_size)[validation.inputs]
    wanted = validation.inputs * vocab_size + validation.targets
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    joint = np.where(keys[place] == wanted, counts[place], 0)
    base = continuation[validation.targets]

    def perplexity(discount: float) -> float:
        direct = (np.maximum(joint - discount, 0) + discount * followers * base) / np.maximum(context, 1)
        return _perplexity(np.where(context > 0, direct, base))

    bigram, discount = min((perplexity(discount), float(discount)) for discount in _DISCOUNTS)
    return NgramBaselines(_perplexity(unigram[validation.targets]), bigram, discount)


def _perplexity(probabilities: NDArray[np.float64]) -> float:
    return float(np.exp(-np.log(probabilities).mean()))
