"""Samples are pure functions of seed, split and number."""

import numpy as np
import pytest

from datamodules.synthetic import Copying, Needles, Recall, Sample, Task
from datamodules.synthetic.task import fill_up

TASKS = [Recall(vocab_size=64, num_pairs=4), Needles(), Copying()]


@pytest.fixture(params=TASKS, ids=lambda task: type(task).__name__)
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def stacked(samples: list[Sample]) -> np.ndarray:
    return np.stack([sample.input_ids for sample in samples])


def test_a_sample_does_not_depend_on_the_ones_before(task: Task) -> None:
    forward = stacked([task.sample(3, "train", i, 200) for i in range(8)])
    backward = stacked([task.sample(3, "train", i, 200) for i in reversed(range(8))])
    np.testing.assert_array_equal(forward, backward[::-1])


def test_no_two_seeds_splits_or_numbers_share_a_sample(task: Task) -> None:
    # also none of the numbers that would be the same 32-bit words, written one behind the other
    keys = [(seed, split, i) for seed in (0, 1, 2**32) for split in ("train", "val", "test") for i in (0, 1, 2, 2**32)]
    samples = stacked([task.sample(*key, 200) for key in keys])
    assert len(np.unique(samples, axis=0)) == len(keys)


def test_a_split_that_does_not_exist_is_refused(task: Task) -> None:
    with pytest.raises(KeyError, match="valid"):
        task.sample(0, "valid", 0, 200)


def test_the_identity_tells_tasks_apart() -> None:
    identities = {task.identity() for task in [*TASKS, Copying(num_symbols=3), Recall(num_pairs=4)]}
    assert len(identities) == 5


def test_answers_come_with_their_end_and_nothing_behind_counts() -> None:
    parts = np.array([3, 6, 4]), np.array([5, 6]), np.array([-1, 1])
    sample = fill_up(*parts, items=2, eos_id=9, seq_len=7)
    assert sample.input_ids.tolist() == [3, 6, 4, 5, 6, 9, 9]
    assert sample.labels.tolist() == [-100, -100, 5, 6, 9, -100, -100]
    assert sample.distance.tolist() == [0, 0, 0, 2, 0, 0, 0]
    assert sample.items == 2
    sample = fill_up(*parts, items=2, eos_id=9, seq_len=5)
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == ([3, 6, 4, 5, 6], [-100, -100, 5, 6, 9])
