"""Copying: say a string of symbols again (Jelassi et al., arXiv 2402.01032)."""

from dataclasses import dataclass

import numpy as np

from datamodules.resumable import check_at_least
from datamodules.synthetic.task import Sample, Task, fill_up


@dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """A string of symbols, a delimiter, then the string again and an end of text, which are the answer.

    Symbols are drawn uniformly and may repeat. The ids are those of the symbols, then the delimiter, then the end.

    Attributes:
        num_symbols: different symbols.
        min_length: symbols of the shortest string. null for `max_length`.
        max_length: symbols of the longest string; lengths are drawn uniformly. null for the longest that fits into
            the sequence, (T - 1) // 2.

    Raises:
        ValueError: numbers that do not fit each other.
    """

    num_symbols: int = 26
    min_length: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, num_symbols=self.num_symbols, min_length=self.min_length, max_length=self.max_length)
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is above max_length={self.max_length}")

    @property
    def vocab_size(self) -> int:
        """The symbols, the delimiter and the end of text."""
        return self.num_symbols + 2

    @property
    def eos_id(self) -> int:
        """The last id."""
        return self.num_symbols + 1

    @property
    def min_seq_len(self) -> int:
        """Room for the longest string twice and the delimiter; the end of text is only a target."""
        return 2 * (self.max_length or self.min_length or 1) + 1

    def draw(self, rng: np.random.Generator, seq_len: int) -> Sample:
        """See `Task.draw`."""
        longest = self.max_length or (seq_len - 1) // 2
        length = rng.integers(self.min_length or longest, longest, endpoint=True)
        string = rng.integers(self.num_symbols, size=length)
        prompt, said = np.append(string, self.num_symbols), np.arange(length)
        return fill_up(prompt, string, said, int(length), self.eos_id, seq_len)
