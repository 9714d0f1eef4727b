"""Documents of text from a folder of .txt, .jsonl or .parquet files, and which of them are held out."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


class Document(NamedTuple):
    """A text, and whether it is kept for validation."""

    text: str
    held_out: bool


class SourceError(ValueError):
    """Text that cannot be read as asked; the message names the file and the fix."""


def is_held_out(key: str, share: float) -> bool:
    """Whether the document known by `key` is held out: a fixed coin per key, heads with probability `share`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def list_files(folder: Path) -> list[Path]:
    """All text files below `folder`, sorted; hidden files are passed over.

    Raises:
        SourceError: no such folder, nothing in it, or a file of another kind.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: --source is 'docstrings' or a folder of text files")
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    for path in files:
        if path.suffix not in _FORMATS:
            raise SourceError(f"{folder / path} is not one of {', '.join(_FORMATS)}: move it elsewhere")
    if not files:
        raise SourceError(f"{folder} is empty: put {', '.join(_FORMATS)} files into it")
    return [folder / path for path in files]


def folder_documents(files: Iterable[Path], text_key: str, held_out: float) -> Iterator[Document]:
    """The documents of `files`, in order: each .txt file is one, and each row of .jsonl and .parquet.

    A document is held out by its own text, so that copies of it never stand on both sides. Empty ones are
    left out.

    Args:
        files: what to read, see `list_files`.
        text_key: the column of .jsonl and .parquet that holds the text.
        held_out: share of the documents to hold out.

    Raises:
        SourceError: a file that cannot be read, or has no text in that column.
    """
    for path in files:
        for text in _texts(path, text_key):
            if text and not text.isspace():
                yield Document(text, is_held_out(text, held_out))


def _texts(path: Path, text_key: str) -> Iterator[str]:
    if path.suffix == ".txt":
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        return
    for number, row in enumerate(_rows(path), 1):
        text = row.get(text_key)
        if not isinstance(text, str):
            found = f"a {type(text).__name__}" if text_key in row else f"only {', '.join(map(repr, row))}"
            raise SourceError(f"{path}, row {number}: no text in {text_key!r} but {found}; choose --text_key")
        yield text


def _rows(path: Path) -> Iterator[dict[str, object]]:
    # imported here: it takes longer than preparing docstrings needs to begin
    from datasets import load_dataset

    kind = _FORMATS[path.suffix]
    try:
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:
        raise SourceError(f"{path} cannot be read as {kind}: {error}") from error
