from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.tokenizer import (
    END_OF_TEXT,
    describe_tokenizer,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "a cat, the other cat\n\n    and the mat"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300)


@given(st.text() | st.text(alphabet="<|endoftx>the cat \n", max_size=60) | st.just(f"a{END_OF_TEXT}b"))
def test_decoding_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text
    assert end_of_text_id(TOKENIZER) not in ids


def test_merges_are_learned() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat").ids
    assert len(ids) < 10
    assert TOKENIZER.get_vocab_size() <= 300
    assert max(ids) > 256


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, texts in zip(paths, (TEXTS, TEXTS, TEXTS[:1]), strict=True):
        train_tokenizer(texts, 300).save(str(path))
    assert fingerprint(paths[0]) == fingerprint(paths[1]) != fingerprint(paths[2])


def test_loading_a_file_or_its_folder(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    text = f"the cat {END_OF_TEXT}"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(text).ids == TOKENIZER.encode(text).ids


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(TOKENIZER.to_str().replace(END_OF_TEXT, "<stop>"))
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "b.json")
    with pytest.raises(ValueError, match="vocab_size=256 is too small"):
        train_tokenizer(TEXTS, 256)


def test_a_tokenizer_comes_from_the_hub_by_its_name(hub: Path, tmp_path: Path) -> None:
    TOKENIZER.save(str(hub / "tokenizer.json"))
    save_tokenizer("some/model", tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    assert describe_tokenizer("some/model") == "some/model"


def test_a_repository_with_a_sentencepiece_model_alone(hub: Path, tmp_path: Path) -> None:
    (hub / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer.model is no SentencePiece model"):
        save_tokenizer("some/model", tmp_path / "saved.json")
    (hub / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"some/model is neither a file here nor a repository of the hub with"):
        save_tokenizer("some/model", tmp_path / "saved.json")


@pytest.mark.parametrize("name", ["none.json", "none.model", "some/folder/below"])
def test_files_that_are_missing_are_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: give a tokenizer.json"):
        save_tokenizer(name, tmp_path / "saved.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no tokenizer.json and no tokenizer.model"):
        save_tokenizer(tmp_path / "empty", tmp_path / "saved.json")
