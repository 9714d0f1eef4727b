"""Multi-query associative recall (Arora et al., arXiv 2312.04927)."""

from dataclasses import dataclass

import numpy as np

from datamodules.dataset import IGNORED
from datamodules.resumable import check_at_least
from datamodules.synthetic.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs of a key and a value; then, among noise, some of the keys again, whose values are the answers.

    As in the paper's code, id 0 is no key and no value, the keys come from the lower half of the ids and the values
    from the upper one, all of a sample's are different, a query at slot i >= 1 of two tokens behind the pairs is as
    likely as i^(a - 1), and the answer is not in the input, which would tell that no later one is the same.
    Different from it: noise is never a key of the sample, so that a key always asks; keys asked for may be fewer than
    there are, and which of them comes first does not depend on the order of the pairs, as it does where the paper draws
    near slots for the first ones.

    Attributes:
        vocab_size: ids in all: 0 for the end of text, vocab_size // 2 - 1 keys, and values.
        num_pairs: keys with their values.
        num_queries: keys asked for. null for all.
        power_a: a of the power law above. Small ones ask mostly soon after the pairs, 1 anywhere alike.
        noise: whether random ids stand between the queries, or id 0, as in the paper's experiments.

    Raises:
        ValueError: numbers that do not fit each other, or too few ids for the pairs.
    """

    vocab_size: int = 8192
    num_pairs: int = 8
    num_queries: int | None = None
    power_a: float = 0.01
    noise: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, num_pairs=self.num_pairs, num_queries=self.num_queries)
        if (self.num_queries or 0) > self.num_pairs:
            raise ValueError(f"num_queries={self.num_queries} keys cannot be asked for, there are {self.num_pairs}")
        if self.vocab_size < 2 * self.num_pairs + 2:
            fix = f"{self.num_pairs} pairs need a vocab_size of at least {2 * self.num_pairs + 2}"
            raise ValueError(f"vocab_size={self.vocab_size} is too small: {fix}")
        if not self.power_a > 0:
            raise ValueError(f"power_a={self.power_a} must be above 0")

    @property
    def eos_id(self) -> int:
        """Neither a key, a value nor noise; it fills up batches."""
        return 0

    @property
    def min_seq_len(self) -> int:
        """Room for pairs and queries, without the noise behind the last one."""
        return 2 * (self.num_pairs + self._asked) - 1

    @property
    def _asked(self) -> int:
        return self.num_queries or self.num_pairs

    def draw(self, rng: np.random.Generator, seq_len: int) -> Sample:
        """See `Task.draw`."""
        half, context = self.vocab_size // 2, 2 * self.num_pairs
        all_keys = rng.permutation(np.arange(1, half))
        keys, others = np.split(all_keys, [self.num_pairs])
        values = rng.choice(np.arange(half, self.vocab_size), self.num_pairs, replace=False)
        noise = np.concatenate([others, np.arange(half, self.vocab_size)]) if self.noise else [self.eos_id]
        input_ids, labels = rng.choice(noise, seq_len), np.full(seq_len, IGNORED)
        input_ids[:context:2], input_ids[1:context:2] = keys, values

        slots = np.arange(1, (seq_len - context + 1) // 2 + 1)
        weights = slots ** (self.power_a - 1)
        places = context + 2 * (rng.choice(slots, self._asked, replace=False, p=weights / weights.sum()) - 1)
        asked = rng.permutation(self.num_pairs)[: self._asked]
        input_ids[places], labels[places] = keys[asked], values[asked]
        return Sample(input_ids, labels)
