"""Which sample is trained on when: an order that is a pure function of (seed, epoch, position).

The order is computed, never stored: a keyed permutation of [0, n) costs no memory and can be entered
anywhere, so ranks, workers and restarts need nothing but a number to agree. Positions are dealt out in the
order

    micro step m, rank r of R, micro batch b:   positions (m R + r) b ... + b - 1

so any ranks and micro batches with the same product R * b * accumulation give an optimiser step the same
samples.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

_ROUNDS = 6
_BLOCK = 1 << 14
PADDING = -1


def shuffled(positions: NDArray[np.int64], total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples at `positions` (N,) of the shuffled order of `total` samples: a permutation of [0, total).

    A Feistel network on pairs (left, right) of digits to base ceil(sqrt(total)): every round adds a keyed
    hash of one digit to the other, which is invertible. The few pairs beyond `total` are sent through again
    until they land inside (cycle walking), which keeps the whole a permutation.
    """
    base = np.uint64(math.isqrt(max(total - 1, 0)) + 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
    samples = positions.astype(np.uint64)
    outside = np.arange(len(samples))
    while len(outside):
        left, right = np.divmod(samples[outside], base)
        for key in keys:
            left, right = right, (left + _hash(right ^ key)) % base
        samples[outside] = left * base + right
        outside = outside[samples[outside] >= total]
    return samples.astype(np.int64)


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (the finaliser of SplitMix64), and keep 32 so that adding a digit cannot overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values >> np.uint64(32)


class TrainSampler(Sampler[NDArray[np.int64]]):
    """Micro batches of sample numbers for one rank, every sample once an epoch, shuffled anew every epoch.

    The last global batch of an epoch is filled up with PADDING (-1), samples whose targets are all ignored. `len()`
    counts the micro batches of a whole epoch wherever the sampler starts, as Lightning counts.

    Args:
        total: samples in the data.
        micro_batch: samples a rank takes at once.
        global_batch: samples of an optimiser step over all ranks; a multiple of micro_batch * world_size.
        rank, world_size: this rank among how many.
        seed, epoch: which order.
        start: samples of this epoch, padding included, that all ranks together have consumed; a multiple of
            micro_batch * world_size.
        shuffle: False takes the samples as they stand.

    Raises:
        ValueError: the numbers do not fit each other, or there is no sample.
    """

    def __init__(
        self,
        total: int,
        *,
        micro_batch: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = True,
    ) -> None:
        step = micro_batch * world_size
        if not 0 <= rank < world_size or micro_batch < 1:
            raise ValueError(f"impossible ranks or batch: {rank=}, {world_size=}, {micro_batch=}")
        if global_batch < 1 or global_batch % step:
            raise ValueError(f"{global_batch=} is not a multiple of {micro_batch=} x {world_size=}")
        if total < 1:
            raise ValueError("the data holds no sample: prepare some")
        if start < 0 or start % step:
            raise ValueError(f"cannot start at sample {start}: it is not a multiple of {micro_batch=} x {world_size=}")
        self.total, self.seed, self.epoch, self.start, self.shuffle = total, seed, epoch, start, shuffle
        self.samples_per_epoch = -(-total // global_batch) * global_batch
        self._micro_batch, self._rank, self._step = micro_batch, rank, step

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`; the current one keeps its start, as Lightning names it again."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.samples_per_epoch // self._step

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        # epoch and start are read now, not when a worker first asks: Lightning may call set_epoch in between
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[NDArray[np.int64]]:
        block = max(1, _BLOCK // self._micro_batch)
        lane = np.arange(self._micro_batch) + self._rank * self._micro_batch
        for first in range(start // self._step, len(self), block):
            micro_steps = np.arange(first, min(first + block, len(self)))
            yield from self.samples(micro_steps[:, None] * self._step + lane, epoch)

    def micro_batch(self, number: int) -> list[int]:
        """The samples of this rank's micro batch `number` of the epoch, without PADDING."""
        first = number * self._step + self._rank * self._micro_batch
        samples = self.samples(np.arange(first, first + self._micro_batch), self.epoch)
        return samples[samples != PADDING].tolist()

    def samples(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The samples at the positions (any shape) of an epoch; PADDING behind the last one."""
        real = positions < self.total
        places = np.where(real, positions, 0)
        if self.shuffle:
            places = shuffled(places.ravel(), self.total, self.seed, epoch).reshape(places.shape)
        return np.where(real, places, PADDING)


class EvalSampler(Sampler[NDArray[np.int64]]):
    """Micro batches of sample numbers for one rank, in order, every sample once over all ranks.

    Every rank takes the same number of full micro batches, as collective operations need; places past the end
    are PADDING (-1), which a TokenDataset turns into end-of-text tokens, whose targets are ignored.

    Args:
        total: samples in the data.
        micro_batch: samples a rank takes at once.
        rank, world_size: this rank among how many.
    """

    def __init__(self, total: int, *, micro_batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._total, self._micro_batch, self._rank, self._world_size = total, micro_batch, rank, world_size

    def __len__(self) -> int:
        return -(-self._total // (self._micro_batch * self._world_size))

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for micro_step in range(len(self)):
            first = (micro_step * self._world_size + self._rank) * self._micro_batch
            samples = np.arange(first, first + self._micro_batch)
            yield np.where(samples < self._total, samples, PADDING)
