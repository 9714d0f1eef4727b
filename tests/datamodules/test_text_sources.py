import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.text_sources import SourceError, folder_documents, is_held_out, list_files


def texts(folder: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in folder_documents(list_files(folder), text_key, 0.5)]


def jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_every_kind_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first\nline two")
    jsonl(tmp_path / "b.jsonl", [{"text": "second", "id": 1}, {"text": " \n"}, {"text": "thïrd"}])
    pq.write_table(pa.table({"text": ["fourth", "fifth"], "n": [1, 2]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / ".hidden").write_text("not this")
    assert texts(tmp_path) == ["first\nline two", "second", "thïrd", "fourth", "fifth"]


def test_text_from_another_column(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"body": "this", "text": "not this"}])
    assert texts(tmp_path, "body") == ["this"]


def _nothing(folder: Path) -> None:
    pass


def _as_rows(name: str, rows: list[dict[str, object]]) -> Callable[[Path], None]:
    return lambda folder: jsonl(folder / name, rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "is empty: put .txt, .jsonl, .parquet files into it"),
        (lambda folder: folder.rmdir(), "is not a folder: --source is 'docstrings' or"),
        (lambda folder: (folder / "a.pdf").touch(), "a.pdf is not one of .txt, .jsonl, .parquet"),
        (lambda folder: (folder / "a.txt").write_bytes(b"ab\xff"), "a.txt is not UTF-8 text .*at byte 2"),
        (_as_rows("a.jsonl", [{"text": "x"}, {"text": None}]), "a.jsonl, row 2: no text in 'text' but a NoneType"),
        (_as_rows("a.jsonl", [{"body": "x"}]), "a.jsonl, row 1: no text in 'text' but only 'body'; choose --text"),
        (_as_rows("a.jsonl", [{"text": 3}]), "a.jsonl, row 1: no text in 'text' but a int"),
        (lambda folder: (folder / "a.jsonl").write_text('{"text": '), "a.jsonl cannot be read as json"),
        (lambda folder: (folder / "a.parquet").write_text("no"), "a.parquet cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    make(folder)
    with pytest.raises(SourceError, match=message):
        texts(folder)


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": f"document {i % 50}"} for i in range(100)])
    documents = list(folder_documents(list_files(tmp_path), "text", 0.5))
    held_out, trained = ({d.text for d in documents if d.held_out is side} for side in (True, False))
    assert not held_out & trained
    assert len(held_out) + len(trained) == 50


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_share_is_kept(share: float) -> None:
    chosen = {key for key in map(str, range(10_000)) if is_held_out(key, share)}
    assert abs(len(chosen) / 10_000 - share) < 0.015
    assert chosen <= {key for key in map(str, range(10_000)) if is_held_out(key, share + 0.1)}
