"""What a synthetic task is: a pure function from a number to a sample."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.dataset import IGNORED

# The splits are streams of their own, so that none shares a sample with another but by chance.
_STREAMS = {"train": 0, "val": 1, "test": 2}


class Sample(NamedTuple):
    """A row of a task, and what makes its answers hard.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, the answer asked for behind each token, -100 where none is.
        distance: (T,) int64, how many tokens back from there the answer stands; 0 where it does not, as for the end of
            text behind an answer.
        items: how many things are to be kept in mind: pairs, needles or symbols.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    distance: NDArray[np.int64]
    items: int


class Task(ABC):
    """Samples of T tokens, in which every answer follows from the tokens before it."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The token that ends a sample, and fills up what is behind."""

    @property
    @abstractmethod
    def min_seq_len(self) -> int:
        """The smallest T that the task fits into."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, seq_len: int) -> Sample:
        """A sample of seq_len tokens, at least `min_seq_len`."""

    def identity(self) -> str:
        """What decides the samples besides their numbers, the same on every machine."""
        return repr(self)

    def check_seq_len(self, seq_len: int) -> None:
        """Raise a ValueError if the task does not fit."""
        if seq_len < self.min_seq_len:
            raise ValueError(f"{self} does not fit into seq_len={seq_len}: it needs at least {self.min_seq_len}")

    def sample(self, seed: int, split: str, i: int, seq_len: int) -> Sample:
        """Sample i of `split` ("train", "val" or "test"): a pure function of its arguments.

        Raises:
            ValueError: the task does not fit into seq_len.
        """
        self.check_seq_len(seq_len)
        # as a spawn key, unlike as further entropy, (split, i) never meets the key of another seed
        seeds = np.random.SeedSequence(seed, spawn_key=(_STREAMS[split], i))
        return self.draw(np.random.default_rng(seeds), seq_len)


def fill_up(
    prompt: NDArray[np.int64], answer: NDArray[np.int64], said: NDArray[np.int64], items: int, eos_id: int, seq_len: int
) -> Sample:
    """`prompt`, `answer` and an end of text, which is asked for like the answer; ends of text behind.

    Args:
        prompt: (P,) tokens.
        answer: (A,) tokens.
        said: (A,) where in the prompt each token of the answer stands; -1 where it does not.
        items: see `Sample`.
        eos_id: the end of text.
        seq_len: T, at least P + A.
    """
    tokens, end = np.full(seq_len + 1, eos_id), len(prompt) + len(answer)
    tokens[:end] = np.concatenate([prompt, answer])
    labels = np.full(seq_len, IGNORED)
    labels[len(prompt) - 1 : end] = tokens[len(prompt) : end + 1]
    asking = np.arange(len(prompt) - 1, end - 1)
    distance = np.zeros(seq_len, dtype=np.int64)
    distance[asking] = np.where(said >= 0, asking - said, 0)
    return Sample(tokens[:-1], labels, distance, items)
