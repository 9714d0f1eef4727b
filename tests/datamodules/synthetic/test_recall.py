import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.synthetic import Recall, Sample


def solve(sample: Sample, num_pairs: int) -> dict[int, int]:
    """Place of every question, and the answer, from what was said about its key before."""
    tokens = sample.input_ids.tolist()
    said = dict(zip(tokens[: 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2], strict=True))
    return {t: said[key] for t, key in enumerate(tokens) if t >= 2 * num_pairs and key in said}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_answers_follow_from_the_pairs(data: st.DataObject) -> None:
    num_pairs = data.draw(st.integers(1, 12))
    num_queries = data.draw(st.integers(1, num_pairs))
    task = Recall(
        vocab_size=data.draw(st.integers(2 * num_pairs + 2, 80)), num_pairs=num_pairs, num_queries=num_queries,
        power_a=data.draw(st.sampled_from([0.01, 0.5, 1.0])), noise=data.draw(st.booleans()),
    )  # fmt: skip
    seq_len = task.min_seq_len + data.draw(st.integers(0, 40))
    sample = task.sample(data.draw(st.integers(0, 2**40)), "train", data.draw(st.integers(0, 10**9)), seq_len)
    assert len(sample.input_ids) == len(sample.labels) == seq_len
    places = np.flatnonzero(sample.labels != -100)
    assert solve(sample, num_pairs) == {t: sample.labels[t] for t in places}
    assert len(places) == num_queries
    assert sample.items == num_pairs
    np.testing.assert_array_equal(sample.input_ids[places - sample.distance[places]], sample.labels[places])
    assert not sample.distance[sample.labels == -100].any()
    half, pairs = task.vocab_size // 2, sample.input_ids[: 2 * num_pairs]
    assert len(set(pairs.tolist())) == 2 * num_pairs, "one key said twice would make the answer ambiguous"
    assert pairs[::2].min() >= 1
    assert pairs[::2].max() < half <= pairs[1::2].min()
    said = {*range(2 * num_pairs), *places}
    between = [token for t, token in enumerate(sample.input_ids) if t not in said]
    assert set(between) <= ({0} if not task.noise else set(range(1, task.vocab_size)))
    assert sample.input_ids.max() < task.vocab_size


def test_the_smallest_sequence_holds_pairs_and_queries_and_nothing_else() -> None:
    task = Recall(vocab_size=20, num_pairs=3, num_queries=2)
    assert task.min_seq_len == 9  # nothing behind the last query
    assert solve(task.sample(0, "val", 0, 9), 3).keys() == {6, 8}
    with pytest.raises(ValueError, match=r"Recall\(vocab_size=20.*seq_len=8: it needs at least 9"):
        task.sample(0, "val", 0, 8)


def test_numbers_of_pairs_are_drawn_and_all_of_them_are_asked_for() -> None:
    task = Recall(vocab_size=20, num_pairs=4, min_pairs=2)
    samples = [task.sample(0, "train", i, 20) for i in range(150)]
    for sample in samples:
        places = np.flatnonzero(sample.labels != -100)
        assert len(places) == sample.items
        assert solve(sample, sample.items) == {t: sample.labels[t] for t in places}
    drawn = np.bincount([sample.items for sample in samples])
    assert len(drawn) == 5
    assert drawn[:2].sum() == 0
    assert drawn[2:].min() > 30


def test_a_small_power_asks_early_and_one_asks_anywhere() -> None:
    def middle(power_a: float) -> float:
        task = Recall(vocab_size=64, num_pairs=1, power_a=power_a)
        return float(np.mean([np.argmax(task.sample(0, "train", i, 201).labels) for i in range(400)]))

    # slots 1 to 100 with weights i^-0.99 have their mean at 19.6, with equal ones at 50.5
    weights = np.arange(1, 101) ** -0.99
    near = weights @ np.arange(1, 101) / weights.sum()
    assert middle(0.01) == pytest.approx(2 * near, rel=0.15)
    assert middle(1.0) == pytest.approx(2 * 50.5, rel=0.06)


def test_every_key_is_as_likely_to_be_asked_for() -> None:
    task, asked = Recall(vocab_size=64, num_pairs=4, num_queries=1), np.zeros(4)
    for i in range(400):
        sample = task.sample(1, "train", i, 20)
        asked += sample.input_ids[1:8:2] == sample.labels.max()
    assert asked.min() > 70
    assert asked.sum() == 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0 must be at least 1"),
        ({"num_queries": 0}, "num_queries=0 must be at least 1"),
        ({"num_queries": 9}, "num_queries=9 keys cannot be asked for, there are 8"),
        ({"vocab_size": 17}, "vocab_size=17 is too small: 8 pairs need a vocab_size of at least 18"),
        ({"min_pairs": 0}, "min_pairs=0 must be at least 1"),
        ({"min_pairs": 9}, "min_pairs=9 is above num_pairs=8"),
        ({"min_pairs": 2, "num_queries": 3}, "num_queries=3 keys cannot be asked for, there are 2"),
        ({"power_a": 0.0}, "power_a=0.0 must be above 0"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**options)
