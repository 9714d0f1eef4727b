"""Files of prompts, and results that are whole or can be gone on with."""

import json
from pathlib import Path

import pytest

from rat_cli.prompts import Results, read_prompts


def test_prompts_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(" é one\r\ntwo {}\n".encode())
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": " é one"}, {"prompt": "two {}"}]
    rows = [{"id": 7, "prompt": "one\nline"}, {"prompt": "\u2028 two", "answers": ["x"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_prompts(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\nthree\n", "a.txt, line 2: the prompt is empty"),
        ("a.txt", b"one\n\xff\n", "a.txt, line 2 is no UTF-8"),
        ("a.txt", b"", "a.txt holds no prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl, line 2 is no JSON (Expecting"),
        ("a.jsonl", b'{"prompt": "a"}\n\n', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n', 'a.jsonl, line 1 holds no text called "prompt": every line is a row like'),
        ("a.jsonl", b'["a"]\n', "a.jsonl, line 1 holds no text"),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl, line 1 holds no text"),
        ("a.jsonl", b'{"prompt": ""}\n', "a.jsonl, line 1: the prompt is empty"),
    ],
)
def test_the_line_at_fault_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)


MADE_WITH = {"seed": 1, "temperature": 0.5}


def test_results_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.jsonl"
    results = Results(path, MADE_WITH, batch_size=2)
    assert results.done == 0
    for i in range(3):
        results.append([{"i": 2 * i}, {"i": 2 * i + 1, "text": "ä"}])
        assert not path.exists()
    results.finish()
    assert [json.loads(line) for line in path.read_text().splitlines()][3:5] == [{"i": 3, "text": "ä"}, {"i": 4}]
    assert [entry.name for entry in path.parent.iterdir()] == ["found.jsonl"]
    with pytest.raises(FileExistsError, match=r"found.jsonl exists: choose another --output"):
        Results(path, MADE_WITH, batch_size=2)


@pytest.mark.parametrize("torn", ["", '{"i": 9', '{"i": 9}\n', '{"i": 9}\n{"i"'])
def test_interrupted_results_go_on_behind_the_last_whole_batch(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "found.jsonl"
    Results(path, MADE_WITH, batch_size=2).append([{"i": 0}, {"i": 1}])
    (partial,) = tmp_path.iterdir()
    partial.write_text(partial.read_text() + torn)
    with pytest.raises(ValueError, match=r"found.jsonl.partial was begun with temperature=0.5: remove it"):
        Results(path, MADE_WITH | {"temperature": 1.0}, batch_size=2)
    results = Results(path, MADE_WITH, batch_size=2)
    assert results.done == 2
    results.append([{"i": 2}])
    results.finish()
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_foreign_partial_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "found.jsonl.partial").write_text("mine\n")
    with pytest.raises(ValueError, match="was begun with something else: remove it"):
        Results(tmp_path / "found.jsonl", MADE_WITH, batch_size=2)
    assert (tmp_path / "found.jsonl.partial").read_text() == "mine\n"
