"""How close a written answer comes to its references: F1 and ROUGE-L, as LongBench (arXiv 2308.14508) takes them.

ROUGE-L there is that of the `rouge` package: the texts are cut into sentences at full stops, words are told apart by
white space alone (case and punctuation count), every word counts once however often it stands there, and what both have
in common is the union of the longest common subsequences of all pairs of sentences. That package is not called, as it
raises RecursionError for sentences of about a thousand words, which LongBench then counts as 0.

torchmetrics' `rouge_score(..., rouge_keys="rougeL")` is another number: it lowers the text and drops all but a to z and
0 to 9, does not cut it into sentences, and counts a word as often as it stands there.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What the `rouge` package adds to a denominator.
_EPSILON = 1e-8
# Of a normal distribution: 95 % lie within so many standard errors.
WITHIN = 1.96


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words that both hold, as often as both do; lower case, without ASCII punctuation, a, an and the."""
    words, wanted = _words(prediction), _words(answer)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L's F of the `rouge` package, see above; 0 where a text has no word."""
    sentences, wanted = _sentences(prediction), _sentences(answer)
    if not sentences or not wanted:
        return 0.0
    common = {word for one in wanted for other in sentences for word in _common_subsequence(one, other)}
    precision, recall = (len(common) / len(set().union(*text)) for text in (sentences, wanted))
    return 2 * precision * recall / (precision + recall + _EPSILON)


SCORES: dict[str, Callable[[str, str], float]] = {"f1": token_f1, "rouge_l": rouge_l}


def answer_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Every one of `SCORES`, from 0 to 1, each the best that any of the `answers` gives.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("there is no answer to compare with")
    return {name: max(score(prediction, answer) for answer in answers) for name, score in SCORES.items()}


class Mean(NamedTuple):
    """A mean over items, and the distance to both ends of its 95 % confidence interval, None for a single item."""

    value: float
    within: float | None
    items: int


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """The mean of every score over rows of `answer_scores`; intervals as for a normal distribution."""
    return {name: _mean([row[name] for row in rows]) for name in SCORES} if rows else {}


def _mean(values: list[float]) -> Mean:
    within = WITHIN * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(fmean(values), within, len(values))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone is one empty word there.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the `rouge` package finds."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for j, candidate in enumerate(other):
            row.append(above[j] + 1 if word == candidate else max(above[j + 1], row[j]))
        table.append(row)
    i, j, found = len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(one[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
