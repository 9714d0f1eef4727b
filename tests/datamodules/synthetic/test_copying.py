import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.synthetic import Copying, Sample


def whole(sample: Sample, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """All T + 1 tokens, and which of them are asked for."""
    answers = np.append(False, sample.labels != -100)
    tokens = np.append(sample.input_ids, sample.labels[-1] if answers[-1] else eos_id)
    np.testing.assert_array_equal(tokens[answers], sample.labels[sample.labels != -100])
    return tokens, answers


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_answer_is_the_string_before_the_delimiter(data: st.DataObject) -> None:
    longest = data.draw(st.none() | st.integers(1, 20))
    shortest = data.draw(st.none() | st.integers(1, longest or 20))
    task = Copying(num_symbols=data.draw(st.integers(1, 30)), min_length=shortest, max_length=longest)
    seq_len = task.min_seq_len + data.draw(st.integers(0, 30))
    sample = task.sample(data.draw(st.integers(0, 2**40)), "train", data.draw(st.integers(0, 999)), seq_len)
    tokens, answers = whole(sample, task.eos_id)
    assert len(tokens) == len(answers) == seq_len + 1
    delimiter, end = task.num_symbols, task.num_symbols + 1
    said = tokens.tolist()[: tokens.tolist().index(delimiter)]
    assert tokens[answers].tolist() == [*said, end]
    assert tokens.tolist() == [*said, delimiter, *said, *[end] * (seq_len - 2 * len(said))]
    assert (shortest or longest or (seq_len - 1) // 2) <= len(said) <= (longest or (seq_len - 1) // 2)
    assert answers[len(said) + 1 : 2 * len(said) + 2].all(), "answers stand behind the delimiter, in one piece"
    assert set(said) <= set(range(task.num_symbols))
    asking = np.flatnonzero(sample.labels != -100)
    assert sample.distance[asking].tolist() == [len(said)] * len(said) + [0]
    assert sample.items == len(said)
    assert (task.vocab_size, task.eos_id) == (end + 1, end)


def test_every_length_is_drawn() -> None:
    task = Copying(num_symbols=3, min_length=2, max_length=4)
    drawn = [int((task.sample(0, "train", i, 9).labels != -100).sum()) - 1 for i in range(100)]
    assert np.bincount(drawn, minlength=5).tolist()[:2] == [0, 0]
    assert min(np.bincount(drawn)[2:]) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_symbols": 0}, "num_symbols=0 must be at least 1"),
        ({"min_length": 0}, "min_length=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"min_length": 5, "max_length": 4}, "min_length=5 is above max_length=4"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Copying(**options)


def test_the_smallest_sequence() -> None:
    assert (Copying(min_length=2).sample(0, "val", 0, 5).labels == -100).tolist() == [True] * 2 + [False] * 3
    with pytest.raises(ValueError, match=r"max_length=7\) does not fit into seq_len=14: it needs at least 15"):
        Copying(max_length=7).sample(0, "val", 0, 14)
