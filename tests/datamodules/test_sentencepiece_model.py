"""The ids of SentencePiece itself, for any text."""

import inspect
import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from datamodules.sentencepiece_model import convert
from datamodules.tokenizer import end_of_text_id, load_tokenizer, save_tokenizer

LINES = inspect.getsource(inspect).splitlines() + inspect.getsource(random).splitlines()
# How LLaMA's was trained, as its file says.
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, **{"vocab_size": 1500, **LLAMA, **options}
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("model") / "tokenizer.model")


@pytest.fixture(scope="module")
def theirs(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def ours(model: Path) -> Tokenizer:
    save_tokenizer(model, model.with_name("converted.json"))
    return load_tokenizer(model.with_name("converted.json"))


PIECES = [
    " ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\u2581", "\x00", "\x7f",
    "\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u00e9", "e\u0301", "\u4e2d", "\U0010ffff",
    "<s>", "</s>", "<unk>", "<0x41>", "def ", "self", "return", "....", "----", "====", "aaa", "ss", "00", "1", "a",
]  # fmt: skip
texts = (
    st.text()
    | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
    | st.lists(st.sampled_from(LINES), max_size=5).map("\n".join)
    | st.tuples(st.sampled_from(LINES), st.sampled_from(" -=.#ae\n\u2581"), st.integers(1, 90)).map(
        lambda drawn: drawn[0][:10] + drawn[1] * drawn[2] + drawn[0][10:]
    )
)


@settings(max_examples=2000, deadline=None)
@given(texts)
def test_any_text_has_the_ids_of_sentencepiece(
    theirs: sentencepiece.SentencePieceProcessor, ours: Tokenizer, text: str
) -> None:
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_vocabulary_and_end_of_text(theirs: sentencepiece.SentencePieceProcessor, ours: Tokenizer) -> None:
    assert ours.get_vocab_size() == theirs.get_piece_size()
    assert [ours.id_to_token(i) for i in range(1500)] == [theirs.id_to_piece(i) for i in range(1500)]
    assert end_of_text_id(ours) == theirs.eos_id() == 2


def test_without_a_space_before_the_text(tmp_path: Path) -> None:
    path = train(tmp_path / "a.model", add_dummy_prefix=False)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), convert(path)
    for text in [*LINES[:300], "", " ", " a", "  a  "]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is no BPE"),
        ({"byte_fallback": False}, "has no bytes to fall back on"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalises text \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"user_defined_symbols": ["<sep>"]}, "has symbols of the user's"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = train(tmp_path / "a.model", **options)
    with pytest.raises(ValueError, match=f"a.model is no SentencePiece model of the LLaMA kind: it .*{message}"):
        convert(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe nonsense", b"{}"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.model is no SentencePiece model: copy it again"):
        convert(tmp_path / "a.model")
