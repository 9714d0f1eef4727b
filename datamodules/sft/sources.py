"""Where the examples of a task come from: the Hugging Face hub, or local files with the same columns."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from datamodules.sft.tasks import Example, Row, Task
from datamodules.text_sources import SourceError

SPLITS = ("train", "val", "test")
_ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
Rows = Callable[[], Iterator[tuple[str, Row]]]


class ExampleSource:
    """The examples of a task, by split. Where the source has no validation or test split, training gives some up.

    Which ones is decided by a hash of their context, so that none of these contexts stands on two sides.

    Args:
        task: what the rows are.
        path: a folder of .jsonl, .json, .parquet or .arrow files, whose names or folders begin with the name of their
            split as `datasets` understands it (train, validation or dev, test, ...); or one such file, all of it
            training; None for the task's data set on the hub.
        held_out: share of the training contexts that each missing split is given.
        test_split: the source's split to test on. Default: test, or on the hub the one that has answers.
        needed: what must be there. By default training; "test" where nothing else will be read.

    Attributes:
        version: changes when a local file does.

    Raises:
        SourceError: nothing there, or neither what is needed nor training data to take it from.
    """

    def __init__(
        self,
        task: Task,
        path: Path | None,
        held_out: float,
        test_split: str | None = None,
        needed: str = "train",
    ) -> None:
        self._task, self._held_out = task, held_out
        self.version: str | None = None
        if path is not None:
            found = local_files(path)
            self.version = _version(found)
            rows: dict[str, Rows] = {split: partial(_local_rows, files) for split, files in found.items()}
        elif task.hub is not None:
            rows = {split: partial(_hub_rows, task.hub, split) for split in ("train", "validation", "test")}
        else:
            raise SourceError("the task jsonl has no data set on the hub: give --source, a folder or a file")
        chosen = test_split or ("test" if path else task.hub_test_split)
        if test_split and test_split not in set(rows) - {"train"}:
            raise SourceError(f"test_split={test_split} must be another of {', '.join(rows)} than train")
        names = {"train": "train", "val": "validation", "test": chosen}
        if chosen == "validation":
            del names["val"]
        self._rows = {split: rows[name] for split, name in names.items() if name in rows}
        self._missing = [split for split in SPLITS if split not in self._rows]
        if not {needed, "train"} & set(self._rows):
            wanted = " or ".join(dict.fromkeys([needed, "train"]))
            raise SourceError(f"{path or task.hub} has no split {wanted}, only {', '.join(rows)}")

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of "train", "val" or "test", in order, without looking at what they lack.

        Raises:
            SourceError: rows that cannot be read, or lack a column; the message names the file, the row and the column.
        """
        for place, row in self._rows[split if split in self._rows else "train"]():
            try:
                found = list(self._task.examples(row))
            except SourceError as error:
                raise SourceError(f"{place}: {error}") from None
            own = split in self._rows and split != "train"
            yield from (example for example in found if own or self._side(example.context) == split)

    def _side(self, context: str) -> str:
        """Where a context of the training split belongs."""
        digest = hashlib.sha256(context.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return next((split for n, split in enumerate(self._missing, 1) if place < n * self._held_out), "train")


def local_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split below a folder, as `datasets` finds them. Raises SourceError if it would miss some."""
    if not path.exists():
        raise SourceError(f"{path} does not exist: --source is a folder of files or a file")
    # imported here: it takes longer than everything else needs to begin
    from datasets import load_dataset_builder
    from datasets.data_files import FILES_TO_IGNORE

    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    no_rows = {*FILES_TO_IGNORE, "state.json"}  # of save_to_disk
    files = [file for file in inside if file.suffix in _ENDINGS and file.name not in no_rows]
    if not files:
        raise SourceError(f"{path} holds no {', '.join(_ENDINGS)} file")
    if path.is_file():
        return {"train": files}

    try:
        found = load_dataset_builder(str(path)).config.data_files
    except Exception as error:  # the library raises a dozen kinds
        raise SourceError(f"{path} cannot be read as a data set: {error}") from error
    splits = {str(split): [Path(file) for file in names] for split, names in found.items()}
    taken = {file.resolve() for names in splits.values() for file in names}
    if left := [file for file in files if file.resolve() not in taken]:
        raise SourceError(
            f"{left[0]} belongs to no split, beside {', '.join(sorted(f.name for f in taken))}: name files alike,"
            " such as train.jsonl, validation.jsonl, test.jsonl, or move it elsewhere"
        )
    return splits


def _version(splits: dict[str, list[Path]]) -> str:
    stats = [(split, f.name, f.stat().st_size, f.stat().st_mtime_ns) for split, files in splits.items() for f in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _local_rows(files: list[Path]) -> Iterator[tuple[str, Row]]:
    for path in files:
        kind = _ENDINGS[path.suffix]
        yield from _stream(str(path), "it is damaged, or is something else", kind, "train", data_files=str(path))


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Row]]:
    return _stream(f"{name} ({split})", "without a network, give --source, a folder with a copy of it", name, split)


def _stream(label: str, fix: str, name: str, split: str, **options: str) -> Iterator[tuple[str, Row]]:
    """The rows of a data set, each with its place; nothing of it is kept on disk."""
    from datasets import load_dataset

    try:
        rows: Iterable[Row] = load_dataset(name, split=split, streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{label}, row {number}", row
    except Exception as error:
        raise SourceError(f"{label} cannot be read ({error}): {fix}") from error
