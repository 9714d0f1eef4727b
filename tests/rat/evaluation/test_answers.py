"""F1 and ROUGE-L against numbers made by hand, and against the package whose ROUGE-L it is, where that is installed."""

import math
import random

import pytest
from torchmetrics.functional.text.rouge import rouge_score

from rat.evaluation.answers import Mean, answer_scores, means, rouge_l, token_f1


@pytest.mark.parametrize(
    ("prediction", "answer", "common", "words", "wanted"),
    [
        ("The cat sat.", "the cat", 1, 2, 1),  # without the article: cat sat | cat
        ("a dog, a dog", "dog dog dog", 2, 2, 3),  # as often as both hold it
        ("It's Ann-Marie!", "its annmarie", 2, 2, 2),  # punctuation goes, and joins what it stood between
        ("theme another", "me other", 0, 2, 2),  # articles are whole words
        ("  New\n York\t", "york new", 2, 2, 2),  # order and white space do not matter
        ("", "something", 0, 0, 1),
        ("the", "a", 0, 0, 0),  # nothing is left of either
        ("Café «3»", "café 3", 1, 2, 2),  # only ASCII punctuation goes: «3» stays
    ],
)
def test_f1_by_hand(prediction: str, answer: str, common: int, words: int, wanted: int) -> None:
    expected = 0.0
    if common:
        precision, recall = common / words, common / wanted
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(prediction, answer) == pytest.approx(expected, abs=1e-12)
    assert token_f1(answer, prediction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "common", "words", "wanted"),
    [
        ("cat sat on the mat", "the cat sat on the mat", 5, 5, 5),  # 'the' counts once
        ("The cat sat on the mat.", "the cat sat on the mat", 5, 6, 5),  # 'The' and 'the' are two words
        ("on mat, the cat", "the cat sat on the mat", 2, 4, 5),  # 'mat,' is no 'mat'; 'the cat' or 'on the'
        ("b a", "a b", 1, 2, 2),  # order matters
        ("a b", "a. b", 2, 2, 2),  # the union over the answer's sentences
        ("b. a", "a b", 2, 2, 2),  # and over the prediction's
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4, 8, 5),  # the example of the paper on ROUGE
        ("a b. ", "a b", 2, 3, 2),  # the white space behind a full stop is an empty word of its own
        ("", "a", 0, 1, 1),
        ("...", "a", 0, 1, 1),
        ("a", "b", 0, 1, 1),
    ],
)
def test_rouge_l_by_hand(prediction: str, answer: str, common: int, words: int, wanted: int) -> None:
    precision, recall = common / words, common / wanted
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-7)
    assert rouge_l(answer, prediction) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_is_that_of_the_package() -> None:
    package = pytest.importorskip("rouge").Rouge()
    draw = random.Random(1)
    pieces = ["a", "b", "c", "The", "cat", "cat.", " ", "..", ". ", "\n", "\t", "mat,", "."]
    for _ in range(1000):
        one, other = (
            "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randrange(18))) for _ in range(2)
        )
        try:
            expected = package.get_scores([one], [other], avg=True)["rouge-l"]["f"]
        except (ValueError, AssertionError):  # a text without words
            expected = 0.0
        assert rouge_l(one, other) == expected, (one, other)


def test_a_sentence_of_thousands_of_words_is_scored() -> None:
    text = " ".join(map(str, range(1500)))
    assert rouge_l(text, text) == pytest.approx(1)


@pytest.mark.parametrize(
    ("prediction", "answer", "theirs"),
    [
        ("The cat sat on the mat.", "the cat sat on the mat", 1.0),  # ours 10 / 11: case counts
        ("the cat and the dog", "the dog and the cat", 0.6),  # ours 2 / 4: 'the' once
        ("One. Two three.", "Two three. One.", 2 / 3),  # ours 1: sentence by sentence
    ],
)
def test_where_torchmetrics_differs(prediction: str, answer: str, theirs: float) -> None:
    score = rouge_score(prediction, answer, rouge_keys="rougeL")["rougeL_fmeasure"].item()
    assert score == pytest.approx(theirs)
    assert abs(rouge_l(prediction, answer) - theirs) > 0.05


def test_the_best_reference_counts_for_each_score() -> None:
    answers = ["b a", "a b c d e f g h"]
    assert answer_scores("a b", answers) == {"f1": 1.0, "rouge_l": pytest.approx(0.5)}
    assert answer_scores("a b", answers[::-1]) == answer_scores("a b", answers)
    with pytest.raises(ValueError, match="there is no answer to compare with"):
        answer_scores("a b", [])


def test_means_and_their_intervals_by_hand() -> None:
    rows = [{"f1": 0.0, "rouge_l": 0.5}, {"f1": 1.0, "rouge_l": 0.5}, {"f1": 0.5, "rouge_l": 0.5}]
    found = means(rows)
    # deviations -1/2, 1/2, 0: variance 1/4, its root 1/2, over the root of 3
    assert found == {"f1": Mean(0.5, pytest.approx(1.96 * 0.5 / math.sqrt(3)), 3), "rouge_l": Mean(0.5, 0.0, 3)}
    (f1, _) = means(rows[1:2]).values()
    assert f1 == Mean(1.0, None, 1)
    assert means([]) == {}
