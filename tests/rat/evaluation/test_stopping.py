"""Text ends where a string does, whatever the tokens are."""

import pytest
from tokenizers import Tokenizer

from datamodules.tokenizer import train_tokenizer
from rat.evaluation.stopping import StopStrings


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["an answer\n\nQuestion: what next? ä ö"] * 5, 290)


@pytest.mark.parametrize(
    ("text", "strings", "cut"),
    [
        ("an answer\n\nQuestion: what", ["\nQuestion"], "an answer\n"),
        ("one. two. three", [".", "two"], "one"),
        ("what next? än", ["ä"], "what next? "),
        ("an answer", ["Question"], "an answer"),
        ("Question", ["Question"], ""),
        ("an answer", [""], "an answer"),
    ],
)
def test_rows_end_with_the_first_string(tokenizer: Tokenizer, text: str, strings: list[str], cut: str) -> None:
    tokens = tokenizer.encode(text).ids
    stop, made = StopStrings(tokenizer, strings), []
    for token in tokens:
        made.append(token)
        if stop(3, token):
            break
    assert stop.text(made) == stop.text(tokens) == cut
    # It ends with the very token that completes the string.
    assert (len(made) < len(tokens) or stop.text(made) != text) == (cut != text)
    if cut != text:
        assert StopStrings(tokenizer, strings).text(made[:-1]) == tokenizer.decode(made[:-1])


def test_rows_are_watched_apart(tokenizer: Tokenizer) -> None:
    stop = StopStrings(tokenizer, ["ans"])
    letters = [(0, "a"), (1, "n"), (1, "a"), (0, "n"), (1, "n"), (0, "s"), (1, "s")]
    assert [stop(row, tokenizer.token_to_id(letter)) for row, letter in letters] == [False] * 5 + [True] * 2
