"""A tokenizer whose tokens are bytes, so that lengths can be counted by hand; rows of a task; files of rows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from datamodules.sft.prepare import prepare_sft
from datamodules.tokenizer import train_tokenizer

Rows = list[dict[str, Any]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "bytes.json"
    train_tokenizer(["x"], 257).save(str(path))
    return path


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into a folder, a file for every split: .jsonl, .json (a list), .parquet, or .arrow in its folder."""

    def write(splits: Mapping[str, Rows], ending: str = ".jsonl", name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, rows in splits.items():
            path = folder / f"{split}{ending}"
            if ending == ".parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
            elif ending == ".arrow":
                Dataset.from_list(rows).save_to_disk(folder / split)
            elif ending == ".json":
                path.write_text(json.dumps(rows, indent=1))
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def hub_rows() -> dict[str, dict[str, Any]]:
    """A row of each hub data set, with all its columns."""
    return {
        "narrativeqa": {
            "document": {
                "id": "f0", "kind": "gutenberg", "url": "u", "file_size": 3, "word_count": 2, "start": "s", "end": "e",
                "summary": {"text": "A short story.", "tokens": ["A"], "url": "u", "title": "T"},
                "text": "The whole story.",
            },
            "question": {"text": "Who?", "tokens": ["Who", "?"]},
            "answers": [{"text": "Ann", "tokens": ["Ann"]}, {"text": "Ann B.", "tokens": ["Ann", "B."]}],
        },
        "qmsum": {
            "id": "tr-sq-1", "pid": "tr-sq-1_0", "input": "Who came?\nPM: Hello .\nUI: Hi .", "output": "Two.",
            "input_token_count": 9, "output_token_count": 2,
        },
        "wikisum": {
            "url": "u", "title": "How to sit", "summary": "Sit down.", "article": "Find a chair.", "step_headers": "1",
        },
    }  # fmt: skip


@pytest.fixture
def meeting() -> dict[str, Any]:
    """A meeting as QMSum was published."""
    return {
        "topic_list": [{"topic": "t", "relevant_text_span": [["0", "1"]]}],
        "meeting_transcripts": [{"speaker": "PM", "content": "Hello ."}, {"speaker": "UI", "content": "Hi ."}],
        "general_query_list": [{"query": "Summarize it.", "answer": "They met."}],
        "specific_query_list": [{"query": "Who came?", "answer": "Two.", "relevant_text_span": [["0", "1"]]}],
    }


@pytest.fixture
def plain_rows() -> Callable[..., Rows]:
    """Rows of the task jsonl, of very different lengths."""

    def make(count: int, first: int = 0) -> Rows:
        return [
            {"context": f"c{i}" + " and on" * (i % 7), "input": f"q{i}?", "answer": "a" * (1 + i % 4)}
            for i in range(first, first + count)
        ]

    return make


@pytest.fixture
def prepared(tokenizer: Path, write_rows: Callable[..., Path], plain_rows: Callable[..., Rows], tmp_path: Path) -> Path:
    """A prepared task with 22 training, 9 validation and 5 test examples of at most 96 tokens."""
    source = write_rows({"train": plain_rows(22), "validation": plain_rows(9, 100), "test": plain_rows(5, 200)})
    prepare_sft(tmp_path / "prepared", "jsonl", str(tokenizer), source, seq_len=96, max_new_tokens=16, chunk_size=4)
    return tmp_path / "prepared"
