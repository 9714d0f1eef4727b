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
        min_pairs: those of the smallest sample; numbers of pairs are drawn uniformly from here to num_pairs. null for
            num_pairs always.
        num_queries: keys asked for. null for all.
        power_a: a of the power law above. Small ones ask mostly soon after the pairs, 1 anywhere alike.
        noise: whether random ids stand between the queries, or id 0, as in the paper's experiments.

    Raises:
        ValueError: numbers that do not fit each other, or too few ids for the pairs.
    """

    vocab_size: int = 8192
    num_pairs: int = 8
    min_pairs: int | None = None
    num_queries: int | None = None
    power_a: float = 0.01
    noise: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, num_pairs=self.num_pairs, min_pairs=self.min_pairs, num_queries=self.num_queries)
        if (self.min_pairs or 0) > self.num_pairs:
            raise ValueError(f"min_pairs={self.min_pairs} is above num_pairs={self.num_pairs}")
        fewest = self.min_pairs or self.num_pairs
        if (self.num_queries or 0) > fewest:
            raise ValueError(f"num_queries={self.num_queries} keys cannot be asked for, there are {fewest}")
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
        return 2 * (self.num_pairs + (self.num_queries or self.num_pairs)) - 1

    def draw(self, rng: np.random.Generator, seq_len: int) -> Sample:
        """See `Task.draw`."""
        pairs = self.num_pairs
        if self.min_pairs is not None:
            pairs = int(rng.integers(self.min_pairs, self.num_pairs, endpoint=True))
        queries = self.num_queries or pairs
        half, context = self.vocab_size // 2, 2 * pairs
        all_keys = rng.permutation(np.arange(1, half))
        keys, others = np.split(all_keys, [pairs])
        values = rng.choice(np.arange(half, self.vocab_size), pairs, replace=False)
        noise = np.concatenate([others, np.arange(half, self.vocab_size)]) if self.noise else [self.eos_id]
        input_ids, labels = rng.choice(noise, seq_len), np.full(seq_len, IGNORED)
        distance = np.zeros(seq_len, dtype=np.int64)
        input_ids[:context:2], input_ids[1:context:2] = keys, values

        slots = np.arange(1, (seq_len - context + 1) // 2 + 1)
        weights = slots ** (self.power_a - 1)
        places = context + 2 * (rng.choice(slots, queries, replace=False, p=weights / weights.sum()) - 1)
        asked = rng.permutation(pairs)[:queries]
        input_ids[places], labels[places] = keys[asked], values[asked]
        distance[places] = places - (2 * asked + 1)
        return Sample(input_ids, labels, distance, pairs)
