import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules.sft.sources import ExampleSource, local_files
from datamodules.sft.tasks import find_task
from datamodules.text_sources import SourceError

Write = Callable[..., Path]


def contexts(source: ExampleSource, split: str) -> list[str]:
    return [example.context for example in source.examples(split)]


def open_plain(path: Path, **options: Any) -> ExampleSource:
    return ExampleSource(find_task("jsonl"), path, **{"held_out": 0.1, **options})


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("task", ["narrativeqa", "qmsum", "wikisum"])
def test_files_like_the_hubs(write_rows: Write, hub_rows: dict[str, Any], task: Any, ending: str) -> None:
    rows = {split: [hub_rows[task]] * n for n, split in enumerate(("train", "validation", "test"), 1)}
    source = ExampleSource(find_task(task), write_rows(rows, ending), 0.1)
    (expected,) = find_task(task).examples(hub_rows[task])
    for n, split in enumerate(("train", "val", "test"), 1):
        assert list(source.examples(split)) == [expected] * n


def test_meetings_in_files_of_their_own(tmp_path: Path, meeting: dict[str, Any]) -> None:
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        (tmp_path / "qmsum" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "qmsum" / split / f"{name}.json").write_text(json.dumps(meeting, indent=1))
    source = ExampleSource(find_task("qmsum"), tmp_path / "qmsum", 0.1)
    answers = [example.answers for split in ("train", "val", "test") for example in source.examples(split)]
    assert answers == [["They met."], ["Two."]] * 4


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch, hub_rows: dict[str, Any]) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[Any]:
        asked.append((name, split, streaming))
        return [hub_rows[task]] * 40

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task in ("narrativeqa", "qmsum"):
        source = ExampleSource(find_task(task), None, 0.1)  # type: ignore[arg-type]
        assert source.version is None
        # the same context forty times: all of it on one side
        assert [len(contexts(source, split)) for split in ("train", "val", "test")] in (
            [40] * 3,
            [40, 0, 40],
            [0, 40, 40],
        )
    names = [(name, split) for name, split, _ in asked]
    assert names[:3] == [("deepmind/narrativeqa", split) for split in ("train", "validation", "test")]
    # SCROLLS' test split has no answers, so validation is the test and training gives up some
    assert names[3:] == [("pszemraj/qmsum-cleaned", split) for split in ("train", "train", "validation")]
    assert all(streaming for _, _, streaming in asked)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(
        SourceError, match=r"qmsum-cleaned \(train\) cannot be read \(division.*give --source, a folder"
    ):
        contexts(source, "train")


@pytest.mark.parametrize("there", [("train",), ("train", "test"), ("train", "validation")])
def test_missing_splits_come_from_training(write_rows: Write, there: tuple[str, ...]) -> None:
    rows = {
        split: [{"context": f"{split} {i % 200}", "input": f"q{i}", "answer": "a"} for i in range(400)]
        for split in there
    }
    source = open_plain(write_rows(rows))
    found = {split: contexts(source, split) for split in ("train", "val", "test")}
    sides = {split: set(names) for split, names in found.items()}
    assert not sides["train"] & sides["val"] | sides["train"] & sides["test"] | sides["val"] & sides["test"]
    assert sum(map(len, found.values())) == 400 * len(there)
    for split in ("val", "test"):
        if {"val": "validation"}.get(split, split) not in there:
            # a tenth of the two hundred contexts, each with both its questions
            assert 2 * 8 <= len(found[split]) <= 2 * 36
            assert all(name.startswith("train") for name in sides[split])
    assert found == {split: contexts(open_plain(write_rows(rows)), split) for split in found}


def test_another_split_to_test_on(write_rows: Write, plain_rows: Callable[..., Any]) -> None:
    rows = {"train": plain_rows(90), "validation": plain_rows(5, 100), "test": plain_rows(6, 200)}
    source = open_plain(write_rows(rows), test_split="validation")
    assert [example.input for example in source.examples("test")] == [f"q{i}?" for i in range(100, 105)]
    inputs = [example.input for split in ("train", "val") for example in source.examples(split)]
    assert sorted(inputs) == sorted(row["input"] for row in rows["train"])
    for wrong in ("train", "dev"):
        with pytest.raises(SourceError, match=f"test_split={wrong} must be another of train, validation, test"):
            open_plain(write_rows(rows), test_split=wrong)


def test_a_file_is_training_data(write_rows: Write, plain_rows: Callable[..., Any]) -> None:
    path = write_rows({"mine": plain_rows(3)}) / "mine.jsonl"
    assert local_files(path) == {"train": [path]}


def test_the_version_is_that_of_the_files(write_rows: Write, plain_rows: Callable[..., Any]) -> None:
    folder = write_rows({"train": plain_rows(3)})
    before = open_plain(folder).version
    assert open_plain(folder).version == before
    write_rows({"train": plain_rows(4)})
    assert open_plain(folder).version != before


ROW = {"context": "c", "input": "i", "answer": "a"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .jsonl, .json, .parquet, .arrow file"),
        ({"train.txt": "x"}, "holds no .jsonl, .json, .parquet, .arrow file"),
        ({"dataset_infos.json": "{}"}, "holds no .jsonl, .json, .parquet, .arrow file"),
        ({"test.jsonl": json.dumps(ROW)}, "has no split train, only test"),
        ({"train.jsonl": json.dumps({"context": "c", "answer": "a"})}, r"train.jsonl, row 1: no column 'input'"),
        (
            {"train.jsonl": json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": 3})},
            "train.jsonl, row 2: 'answer' must be text, got 3",
        ),
        ({"train.jsonl": '{"context": '}, "train.jsonl cannot be read"),
        ({"train.parquet": "no"}, "train.parquet cannot be read"),
        (
            {"train/a.jsonl": json.dumps(ROW), "val.jsonl": json.dumps(ROW)},
            "val.jsonl belongs to no split, beside a.js",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "source").mkdir()
    for name, text in files.items():
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        contexts(open_plain(tmp_path / "source"), "train")


def test_a_test_split_alone_is_enough_where_no_other_is_read(write_rows: Write) -> None:
    folder = write_rows({"test": [ROW]})
    assert contexts(open_plain(folder, needed="test"), "test") == ["c"]
    folder = write_rows({"validation": [ROW]}, name="other")
    with pytest.raises(SourceError, match="has no split test or train, only validation"):
        open_plain(folder, needed="test")


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist: --source is"):
        open_plain(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="jsonl has no data set on the hub: give --source"):
        ExampleSource(find_task("jsonl"), None, 0.1)
