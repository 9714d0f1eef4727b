"""Where text comes from: folders of files, and datasets of the Hugging Face hub; and which documents are held out.

A source is cut into units, in a fixed order, that can be read independently of each other, by as many machines as one
likes. Within a unit the documents come in a fixed order too.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pyarrow import parquet

# How the loaders of `datasets` call what is in the files; .txt files are read here, whole.
_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".json.gz": "json",
    ".json.zst": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# What gzip and zstd make of text, roughly; for the progress bar.
_COMPRESSION = 3
# Files are read one after another until a unit has so many bytes of them.
_UNIT_BYTES = 1 << 26


class Document(NamedTuple):
    """A text, and whether it is kept for validation."""

    text: str
    held_out: bool


class Split(NamedTuple):
    """Which documents are held out: a share of them, chosen by a hash of the seed and the text alone."""

    share: float
    seed: int

    def holds_out(self, key: str) -> bool:
        """A fixed coin for the document known by `key`, heads with probability `share`."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


class SourceError(ValueError):
    """Text that cannot be read as asked; the message names the file and the fix."""


class TextSource(Protocol):
    """What `prepare pretrain` reads.

    Attributes:
        version: what the content depends on, as JSON.
        sizes: bytes of text to expect of each unit; 0 where nobody knows.
    """

    version: Any
    sizes: list[int]

    def documents(self, unit: int) -> Iterator[Document]:
        """The documents of a unit, in order; empty ones are left out."""
        ...


class FolderSource:
    """All text files below a folder, in the order of their names.

    Each .txt file is a document, and each row of .jsonl, .json.gz, .jsonl.gz, .json.zst, .jsonl.zst, .parquet and
    .arrow files. A document is held out by its own text, so that copies of it never stand on both sides.

    Args:
        folder: where they are; hidden files are passed over.
        text_key: the column that holds the text of a row.
        split: what to hold out.

    Raises:
        SourceError: no such folder, nothing in it, or a file of another kind; later, a file that cannot be read, or has
            no text in that column.
    """

    def __init__(self, folder: Path, text_key: str, split: Split) -> None:
        self._text_key, self._split = text_key, split
        files = list_files(folder)
        sizes = [path.stat().st_size for path in files]
        self._units: list[list[Path]] = []
        open_bytes = _UNIT_BYTES
        for path, size in zip(files, sizes, strict=True):
            if open_bytes >= _UNIT_BYTES:
                self._units.append([])
                open_bytes = 0
            self._units[-1].append(path)
            open_bytes += size
        self.sizes = [sum(_text_bytes(path, text_key) for path in unit) for unit in self._units]
        listing = [(str(path.relative_to(folder)), size) for path, size in zip(files, sizes, strict=True)]
        self.version = hashlib.sha256(json.dumps([_UNIT_BYTES, listing]).encode()).hexdigest()

    def documents(self, unit: int) -> Iterator[Document]:
        """See `TextSource.documents`."""
        for path in self._units[unit]:
            texts = _text_file(path) if path.suffix == ".txt" else _texts(_rows(path), self._text_key, str(path))
            yield from _documents(texts, self._split)


class DatasetSource:
    """A dataset of the hub, or a folder with a copy of one, streamed: nothing of it is kept on disk.

    Args:
        path: its name, such as HuggingFaceFW/fineweb-edu, or the folder.
        name: which of its configs, such as sample-10BT.
        subset: which of its splits.
        text_key: the column that holds the text.
        split: what to hold out.

    Raises:
        SourceError: there is no such dataset, config or split, or the hub cannot be reached.
    """

    def __init__(self, path: str, name: str | None, subset: str, text_key: str, split: Split) -> None:
        from datasets import load_dataset_builder

        self._text_key, self._split, self._label = text_key, split, f"{path}, {name or 'default'}"
        try:
            builder = load_dataset_builder(path, name)
            self._rows = builder.as_streaming_dataset(split=subset)
        except Exception as error:  # the library raises a dozen kinds
            raise SourceError(
                f"{self._label}, split {subset} cannot be opened: {error}. Check the names and the network, or give"
                " --source FOLDER with a copy of its files"
            ) from error
        files = (builder.config.data_files or {}).get(subset, [])
        self.sizes = [0] * self._rows.num_shards
        self.version = hashlib.sha256(str((files, getattr(files, "origin_metadata", None))).encode()).hexdigest()

    def documents(self, unit: int) -> Iterator[Document]:
        """See `TextSource.documents`."""
        label = f"{self._label}, file {unit}"
        rows = _named(self._rows.shard(num_shards=len(self.sizes), index=unit), label)
        yield from _documents(_texts(rows, self._text_key, label), self._split)


def open_source(source: str, name: str | None, subset: str, text_key: str, split: Split) -> TextSource:
    """The folder or dataset that `source` names: with `name`, or where there is no such folder, a dataset."""
    if name is None and (Path(source).exists() or source.startswith((".", "/")) or source.count("/") != 1):
        return FolderSource(Path(source), text_key, split)
    return DatasetSource(source, name, subset, text_key, split)


def list_files(folder: Path) -> list[Path]:
    """All text files below `folder`, sorted; hidden files are passed over. Raises SourceError as FolderSource does."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: --source is 'docstrings', a folder or a dataset of the hub")
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    for path in files:
        if _format(path) is None:
            raise SourceError(
                f"{folder / path} is not one of {', '.join(_FORMATS)}: move it elsewhere, or, if the folder is a copy"
                " of a dataset of the hub, say which config of it with --name"
            )
    if not files:
        raise SourceError(f"{folder} is empty: put {', '.join(_FORMATS)} files into it")
    return [folder / path for path in files]


def _text_bytes(path: Path, text_key: str) -> int:
    """About how many bytes of text a file holds."""
    if path.suffix == ".parquet":
        with contextlib.suppress(Exception):  # whatever is wrong with it, reading it will tell
            file = parquet.read_metadata(path)
            groups = [file.row_group(number) for number in range(file.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(file.num_columns)]
            return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
    return path.stat().st_size * (_COMPRESSION if path.suffix in (".gz", ".zst") else 1)


def _format(path: Path) -> str | None:
    return next((kind for ending, kind in _FORMATS.items() if path.name.endswith(ending)), None)


def _documents(texts: Iterator[str], split: Split) -> Iterator[Document]:
    for text in texts:
        if text and not text.isspace():
            yield Document(text, split.holds_out(text))


def _texts(rows: Iterator[Mapping[str, Any]], text_key: str, label: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        text = row.get(text_key)
        if not isinstance(text, str):
            found = f"a {type(text).__name__}" if text_key in row else f"only {', '.join(map(repr, row))}"
            raise SourceError(f"{label}, row {number}: no text in {text_key!r} but {found}; choose --text_key")
        yield text


def _text_file(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8")  # to the letter: as text its line ends would change
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    # imported here: it takes longer than preparing docstrings needs to begin
    from datasets import load_dataset

    kind = _format(path)
    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except Exception as error:
        raise SourceError(f"{path} cannot be read as {kind}: {error}") from error
    yield from _named(rows, f"{path}", f" as {kind}")


def _named(rows: Iterable[Mapping[str, Any]], label: str, how: str = "") -> Iterator[Mapping[str, Any]]:
    """`rows`, with their label in the error if they cannot be read."""
    try:
        yield from rows
    except GeneratorExit:
        raise
    except Exception as error:
        raise SourceError(f"{label} cannot be read{how}: {error}") from error
