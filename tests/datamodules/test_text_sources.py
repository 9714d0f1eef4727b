import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from datamodules.text_sources import FolderSource, SourceError, Split, open_source

HALF = Split(0.5, 0)


def texts(folder: Path | str, text_key: str = "text", name: str | None = None, subset: str = "train") -> list[str]:
    source = open_source(str(folder), name, subset, text_key, HALF)
    return [document.text for unit in range(len(source.sizes)) for document in source.documents(unit)]


def jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_every_kind_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first\nline two")
    jsonl(tmp_path / "b.jsonl", [{"text": "second", "id": 1}, {"text": " \n"}, {"text": "thïrd"}])
    pq.write_table(pa.table({"text": ["fourth", "fifth"], "n": [1, 2]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / ".hidden").write_text("not this")
    assert texts(tmp_path) == ["first\nline two", "second", "thïrd", "fourth", "fifth"]


ROWS = [{"text": f"row {i} \u00e9", "id": i} for i in range(5)]


def _arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KINDS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_bytes(LINES),
    ".json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    ".jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    ".json.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    ".jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    ".parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    ".arrow": _arrow,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / f"rows{kind}")
    assert texts(tmp_path) == [row["text"] for row in ROWS]


def test_small_files_share_a_unit_and_its_size_is_that_of_the_text(tmp_path: Path) -> None:
    for i, kind in enumerate(KINDS):
        KINDS[kind](tmp_path / f"{i}{kind}")
    source = FolderSource(tmp_path, "text", HALF)
    (size,) = source.sizes
    assert 5 * 7 * len(KINDS) < size < 5 * 7 * len(KINDS) * 20


@pytest.fixture
def copy_of_a_dataset(tmp_path: Path) -> Path:
    """FineWeb-Edu's layout: configs in the card, parquet files below sample/ and data/."""
    folder = tmp_path / "fineweb-edu"
    cuts = {
        "data/CC-MAIN-2024-10/0.parquet": ROWS,
        "sample/10BT/000.parquet": ROWS[:2],
        "sample/10BT/001.parquet": ROWS[2:4],
    }
    for name, rows in cuts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    configs = {"default": "data/*/*", "sample-10BT": "sample/10BT/*"}
    card = [{"config_name": name, "data_files": [{"split": "train", "path": path}]} for name, path in configs.items()]
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": card}) + "---\n")
    return folder


def test_a_dataset_is_read_by_its_configs(copy_of_a_dataset: Path) -> None:
    assert texts(copy_of_a_dataset, name="sample-10BT") == [row["text"] for row in ROWS[:4]]
    assert texts(copy_of_a_dataset, name="default") == [row["text"] for row in ROWS]
    source = open_source(str(copy_of_a_dataset), "sample-10BT", "train", "text", HALF)
    assert source.sizes == [0, 0]
    assert [document.text for document in source.documents(1)] == [row["text"] for row in ROWS[2:4]]
    other = open_source(str(copy_of_a_dataset), "default", "train", "text", HALF)
    assert source.version != other.version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sample-9BT"}, "fineweb-edu, sample-9BT, split train cannot be opened: .*sample-10BT"),
        ({"name": "default", "subset": "tran"}, "fineweb-edu, default, split tran cannot be opened: .*train"),
        ({"name": "default", "text_key": "body"}, r"default, file 0, row 1: no text in 'body' but only 'text', 'id'"),
    ],
)
def test_names_that_a_dataset_does_not_have(copy_of_a_dataset: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        texts(copy_of_a_dataset, **options)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=r"no/where, default, split train cannot be opened.*give --source FOLDER with a"
    ):
        texts("no/where")


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
        (_nothing, "is empty: put .txt, .jsonl, .* files into it"),
        (lambda folder: folder.rmdir(), "is not a folder: --source is 'docstrings', a folder or"),
        (lambda folder: (folder / "a.pdf").touch(), r"a.pdf is not one of .txt, .jsonl, .*say which config .* --name"),
        (lambda folder: (folder / "a.txt").write_bytes(b"ab\xff"), "a.txt is not UTF-8 text .*at byte 2"),
        (_as_rows("a.jsonl", [{"text": "x"}, {"text": None}]), "a.jsonl, row 2: no text in 'text' but a NoneType"),
        (_as_rows("a.jsonl", [{"body": "x"}]), "a.jsonl, row 1: no text in 'text' but only 'body'; choose --text"),
        (_as_rows("a.jsonl", [{"text": 3}]), "a.jsonl, row 1: no text in 'text' but a int"),
        (lambda folder: (folder / "a.jsonl").write_text('{"text": '), "a.jsonl cannot be read as json"),
        (
            lambda folder: (folder / "a.jsonl").write_text('{"text": "\\ud83d"}'),
            "as json: .*surrogate",
        ),
        (
            lambda folder: (folder / "a.jsonl").write_bytes(b'{"text": "\xff"}'),
            "as json: .*utf-8",
        ),
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
    documents = list(FolderSource(tmp_path, "text", HALF).documents(0))
    held_out, trained = ({d.text for d in documents if d.held_out is side} for side in (True, False))
    assert not held_out & trained
    assert len(held_out) + len(trained) == 50


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_share_is_kept(share: float) -> None:
    def chosen(share: float, seed: int) -> set[str]:
        return {key for key in map(str, range(10_000)) if Split(share, seed).holds_out(key)}

    assert abs(len(chosen(share, 0)) / 10_000 - share) < 0.015
    assert chosen(share, 0) <= chosen(share + 0.1, 0)
    # two seeds choose independently
    assert abs(len(chosen(share, 0) & chosen(share, 1)) / 10_000 - share**2) < 0.015
