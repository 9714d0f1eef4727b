"""Prompts from files, and what became of them: JSON lines, there whole or not at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_prompts(path: Path) -> list[Row]:
    """The rows of a file: {"prompt": TEXT, ...} of each line of a .jsonl, or {"prompt": LINE} of any other file's.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a line is no such row, is empty or no UTF-8, or there is none; the message names the line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            text = line.decode()
            row = json.loads(text) if path.suffix == ".jsonl" else {"prompt": text}
        except UnicodeDecodeError:
            raise ValueError(f"{place} is no UTF-8: save the file as such") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{place} is no JSON ({error}): every line is a row like {{"prompt": "Some text"}}'
            ) from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise ValueError(
                f'{place} holds no text called "prompt": every line is a row like {{"prompt": "Some text"}}'
            )
        if not prompt:
            raise ValueError(f"{place}: the prompt is empty, every one needs some text")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return rows


class Results:
    """A file of rows that grows by batches, and takes its name when all are there.

    Until then they lie beside it in FILE.partial, behind a line that says what they were made with; a second call with
    the same goes on behind the last whole batch.

    Args:
        path: the file.
        made_with: plain values that decide what the rows are.
        batch_size: rows that come at a time.

    Attributes:
        done: rows that are there already.

    Raises:
        FileExistsError: there is something at path.
        ValueError: what is there was made with something else; the message says what differs.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], batch_size: int) -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another --output")
        self.path, self._partial = path, path.with_name(path.name + ".partial")
        header = (json.dumps(made_with, sort_keys=True) + "\n").encode()
        lines = self._partial.read_bytes().splitlines(keepends=True) if self._partial.is_file() else []
        if lines and lines[0] != header:
            raise ValueError(
                f"{self._partial} was begun with {_differences(lines[0], made_with)}: remove it, or go on so"
            )
        whole = sum(line.endswith(b"\n") for line in lines[1:])
        self.done = whole - whole % batch_size
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines:
            os.truncate(self._partial, sum(map(len, lines[: self.done + 1])))
        else:
            self._partial.write_bytes(header)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of a batch."""
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self) -> None:
        """Give the file its name."""
        kept = self.path.with_name(self.path.name + ".finished")
        kept.write_bytes(self._partial.read_bytes().partition(b"\n")[2])
        kept.replace(self.path)
        self._partial.unlink()


def _differences(header: bytes, made_with: Mapping[str, Any]) -> str:
    try:
        before = dict(json.loads(header))
    except ValueError:
        return "something else"
    return ", ".join(f"{name}={before.get(name)}" for name, value in made_with.items() if before.get(name) != value)
