"""What `data inspect` shows is what was written, and `data verify` finds every flipped byte."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import datamodules.inspection as module
from datamodules.inspection import inspect, verify
from datamodules.shards import ShardError, ShardWriter
from datamodules.tokenizer import fingerprint, load_tokenizer, train_tokenizer

TEXTS = ["The first.", "Another one, of more words.", "é" * 50, *(f"Number {i}." for i in range(40))]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    train_tokenizer(TEXTS, 280).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    sha = fingerprint(folder / "tokenizer.json")
    for split, texts in (("train", TEXTS), ("val", TEXTS[:2])):
        options = {"vocab_size": 280, "eos_id": 0, "tokenizer_sha256": sha, "shard_tokens": 50}
        with ShardWriter(folder / split, **options) as writer:  # type: ignore[arg-type]
            for text in texts:
                writer.write([*tokenizer.encode(text).ids, 0], num_bytes=len(text.encode()), num_documents=1)
    return folder


def test_documents_and_statistics(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    inspect(prepared, num_documents=2)
    out = capsys.readouterr().out
    assert "--- document 0: " in out
    assert "\nThe first.\n" in out
    assert "\nAnother one, of more words.\n" in out
    assert "Number 0." not in out
    lines = {line[:26].strip(): line[26:].strip() for line in out.splitlines()}
    lengths = np.array([len(load_tokenizer(prepared).encode(text).ids) + 1 for text in TEXTS])
    assert lines["tokens"] == f"{lengths.sum()}"
    assert lines["documents"] == "43"
    assert lines["files"] == str(-(-lengths.sum() // 50))
    assert lines["tokens of a document, mean"] == f"{lengths.mean():.1f}"
    assert lines["50% have at most"] == str(int(np.median(lengths)))
    assert lines["shortest, longest"] == f"{lengths.min()}, {lengths.max()}"
    assert matplotlib.image.imread(prepared.parent / "document-lengths.png").std() > 0.05


def test_one_split_some_documents_cut_short(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(prepared / "val", document=1, max_chars=7, plot=prepared / "pictures" / "a.svg")
    out = capsys.readouterr().out
    assert "\nAnother ...\n" in out
    assert "The first" not in out
    assert (prepared / "pictures" / "a.svg").is_file()


def test_raw_files_with_a_tokenizer_given(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = load_tokenizer(prepared).encode("Another one.").ids
    np.array([*ids, 0, *ids], dtype="<u2").tofile(prepared / "raw.bin")
    inspect(prepared / "raw.bin", tokenizer=prepared)
    out = capsys.readouterr().out
    assert out.count("\nAnother one.\n") == 2
    assert "--- document 1: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document": 43}, "has 43 documents, there is none with number 43"),
        ({"document": -1}, "impossible: document=-1"),
        ({"max_chars": 0}, "max_chars=0"),
    ],
)
def test_what_cannot_be_shown(prepared: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect(prepared, **options)  # type: ignore[arg-type]


def test_a_tokenizer_is_needed(prepared: Path) -> None:
    (prepared / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json beside .*train: give --tokenizer FILE"):
        inspect(prepared)


def test_whole_shards_are_confirmed(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(prepared)
    verify(prepared / "val")
    out = capsys.readouterr().out
    assert out.count("val: 1 files") == 2
    assert "train: " in out


@pytest.mark.parametrize("place", [0, 13, 99])
def test_a_flipped_bit_is_found(prepared: Path, place: int) -> None:
    path = prepared / "train" / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-00000.bin does not match its checksum"):
        verify(prepared)


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no shards with an index.json"):
        verify(tmp_path)


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    train_tokenizer(["quite other words"] * 9, 270).save(str(tmp_path / "other.json"))
    with pytest.raises(ShardError, match=r"train was made with another tokenizer than .*other.json"):
        inspect(prepared, tokenizer=tmp_path / "other.json")
