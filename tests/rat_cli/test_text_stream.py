"""Text piece by piece: what comes out is what all tokens decode to at once, in whole characters."""

import random

import pytest
from tokenizers import Tokenizer

from datamodules.tokenizer import end_of_text_id, train_tokenizer
from rat_cli.text_stream import decoded

TEXTS = ["some words and more words é ü ß", "漢字かな交じり文 😀🏳️‍🌈", "tabs\tand\n\nlines", " spaces   all over "]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A byte-level BPE in which most characters beyond ASCII take several tokens."""
    return train_tokenizer(TEXTS * 3, 290)


@pytest.fixture(params=["byte_level", "llama"])
def vocabulary(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def encode(vocabulary: Tokenizer, text: str) -> list[int]:
    return vocabulary.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_in_whole_characters(vocabulary: Tokenizer, text: str) -> None:
    tokens = encode(vocabulary, text)
    pieces = list(decoded(vocabulary, iter(tokens)))
    assert "".join(pieces) == vocabulary.decode(tokens) == text
    assert all(pieces)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(pieces) > 5


@pytest.mark.parametrize("before", ["some", "and " * 20 + "more"])
def test_what_stands_before_decides_about_the_first_space(vocabulary: Tokenizer, llama: Tokenizer, before: str) -> None:
    prompt = encode(vocabulary, before)
    answer = encode(vocabulary, before + " words é")[len(prompt) :]
    assert "".join(decoded(vocabulary, iter(answer), after=prompt)) == " words é"
    assert "".join(decoded(vocabulary, iter(answer))) == ("words é" if vocabulary is llama else " words é")


def test_special_tokens_and_none_are_left_out(vocabulary: Tokenizer) -> None:
    end, tokens = end_of_text_id(vocabulary), encode(vocabulary, "some words")
    mixed = [end, None, *tokens[:3], end, None, *tokens[3:], end, None]
    assert "".join(decoded(vocabulary, iter(mixed))) == "some words"


def test_whole_characters_before_an_unfinished_one_are_shown(vocabulary: Tokenizer) -> None:
    tokens = encode(vocabulary, "words é😀")
    assert "".join(decoded(vocabulary, iter(tokens[:-1]))) == "words é"


def test_any_tokens_are_shown_and_none_raises(vocabulary: Tokenizer, byte_level: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(400):
        tokens = [draw.randrange(vocabulary.get_vocab_size()) for _ in range(draw.randrange(30))]
        text = "".join(decoded(vocabulary, iter(tokens), after=encode(vocabulary, "some")))
        assert not text.endswith("\N{REPLACEMENT CHARACTER}")
        if vocabulary is byte_level:
            assert text == vocabulary.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")
