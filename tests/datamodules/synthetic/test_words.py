import numpy as np
import pytest

from datamodules.synthetic.words import ADJECTIVES, NOUNS, SENTENCES, draw_names, how_many


def test_words_are_different_and_take_the_same_room() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) > 70
        assert {len(word.encode()) for word in words} == {5}


def test_noise_gives_no_hints() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) == 20
    assert not any("magic" in sentence or any(c.isdigit() for c in sentence) for sentence in SENTENCES)
    assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in SENTENCES)


@pytest.mark.parametrize(("kind", "num_digits"), [("numbers", 1), ("numbers", 2), ("words", 7)])
def test_all_names_can_be_drawn_once(kind: str, num_digits: int) -> None:
    count = how_many(kind, num_digits)
    names = draw_names(np.random.default_rng(0), kind, count, num_digits)
    assert len(set(names)) == count
    if kind == "numbers":
        assert sorted(map(int, names)) == list(range(10 ** (num_digits - 1), 10**num_digits))
    else:
        assert set(names) == {f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS}
