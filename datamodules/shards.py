"""Shards: flat arrays of token ids on disk, with an `index.json` that says what they are.

A shard folder holds `*.bin` files (little-endian uint16 or uint32, whichever the vocabulary needs) that read
as one sequence of tokens, in the order of the index. A uint16 file, or a folder of them, without an index
(the format of the released code) opens too; nothing is known of its vocabulary then.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

INDEX = "index.json"
_FORMAT = "rat-shards"
_VERSION = 1


class ShardError(ValueError):
    """Shards are missing, damaged, or of another kind than asked for; the message says how to mend it."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One `.bin` file: its length in tokens, and of its text the bytes (UTF-8), characters and documents, if known."""

    name: str
    num_tokens: int
    num_bytes: int | None = None
    num_chars: int | None = None
    num_documents: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What `index.json` says: how to read the files and which tokenizer made them."""

    dtype: str
    vocab_size: int | None
    eos_id: int | None
    tokenizer_sha256: str | None
    files: list[ShardFile] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `index.json` into `folder`."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an `index.json`. Raises ShardError if it was not written by this project's ShardWriter."""
        try:
            content = json.loads(path.read_text())
            kind, version = content.pop("format"), content.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError):
            kind, version, content = None, None, {}
        if kind != _FORMAT:
            raise ShardError(f"{path} is not an index of this project's shards; prepare the text again")
        if version != _VERSION:
            raise ShardError(f"{path} has format version {version}, this code reads {_VERSION}; prepare again")
        try:
            index = cls(**{**content, "files": [ShardFile(**file) for file in content.get("files", [])]})
        except TypeError as error:
            raise ShardError(f"{path} is damaged ({error}); prepare the text again") from error
        if index.dtype not in ("uint16", "uint32"):
            raise ShardError(f"{path} says dtype {index.dtype!r}; shards are uint16 or uint32: prepare again")
        return index


class TokenShards:
    """All tokens of a shard folder or file as one memory-mapped sequence.

    Args:
        path: a folder with an index, one of its files, a raw uint16 file, or a folder of raw `.bin` files.
        tokenizer_sha256: if given, the tokenizer the shards must have been made with.

    Raises:
        ShardError: nothing there, a truncated or foreign file, another tokenizer.
    """

    def __init__(self, path: str | Path, *, tokenizer_sha256: str | None = None) -> None:
        self.path = Path(path)
        self.folder, self.index = _find(self.path)
        self.dtype = np.dtype(self.index.dtype).newbyteorder("<")
        counts = [file.num_tokens for file in self.index.files]
        self._offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._mapped: list[NDArray[Any]] | None = None
        self._check(tokenizer_sha256)

    @property
    def num_tokens(self) -> int:
        """Tokens of all files together."""
        return int(self._offsets[-1])

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of the text over its tokens (end-of-text tokens included); None if not recorded."""
        sizes = [file.num_bytes for file in self.index.files]
        return None if None in sizes else sum(size or 0 for size in sizes) / self.num_tokens

    @property
    def checksum(self) -> str | None:
        """A sha256 over those of all files, by which two folders are known to hold the same; None if not recorded."""
        known = [file.sha256 for file in self.index.files]
        return None if None in known else hashlib.sha256(" ".join(map(str, known)).encode()).hexdigest()

    def read_into(self, starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        """Copy L tokens from every position in `starts` (B,) into the rows of `out` (B, L)."""
        files = np.searchsorted(self._offsets, starts, side="right") - 1
        firsts = (starts - self._offsets[files]).tolist()
        arrays, length = self._arrays(), out.shape[1]
        for row, file, first in zip(out, files.tolist(), firsts, strict=True):
            piece = arrays[file][first : first + length]
            filled = len(piece)
            row[:filled] = piece
            while filled < length:
                file += 1
                piece = arrays[file][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens from `start` to `stop`, (N,)."""
        out = np.empty((1, stop - start), np.int64)
        self.read_into(np.array([start]), out)
        return out[0]

    def verify(self) -> None:
        """Read every file and compare it with its checksum; ShardError names the first that differs."""
        for file in self.index.files:
            if file.sha256 is None:
                continue
            with (self.folder / file.name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != file.sha256:
                raise ShardError(
                    f"{self.folder / file.name} does not match its checksum in {INDEX}, so it was changed or"
                    " damaged; copy it again or prepare again with --overwrite true"
                )

    def _arrays(self) -> list[NDArray[Any]]:
        if self._mapped is None:
            paths = [self.folder / file.name for file in self.index.files]
            # a plain ndarray view: slicing a np.memmap costs more than copying a short sample
            self._mapped = [np.memmap(path, self.dtype, mode="r").view(np.ndarray) for path in paths]
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would carry the whole file to a spawned worker
        return {**self.__dict__, "_mapped": None}

    def _check(self, tokenizer_sha256: str | None) -> None:
        known = self.index.tokenizer_sha256
        if tokenizer_sha256 is not None and known is not None and tokenizer_sha256 != known:
            raise ShardError(
                f"{self.path} was made with another tokenizer ({known[:12]}, not {tokenizer_sha256[:12]});"
                " use the tokenizer.json beside it, or prepare again with --overwrite true"
            )
        for file in self.index.files:
            path = self.folder / file.name
            if not path.is_file():
                raise ShardError(f"{path} is named in {INDEX} but missing; copy it again or prepare again")
            expected, size = file.num_tokens * self.dtype.itemsize, path.stat().st_size
            if size != expected:
                raise ShardError(
                    f"{path} has {size} bytes, not the {expected} of {file.num_tokens} {self.dtype.name}"
                    " tokens: it was cut short or changed; copy it again or prepare again with --overwrite true"
                )
        if self.num_tokens == 0:
            raise ShardError(f"{self.path} holds no tokens; prepare it from some text")


def _find(path: Path) -> tuple[Path, ShardIndex]:
    """The folder the files are in, and their index: read, or made up for raw files."""
    if not path.exists():
        raise ShardError(f"{path} does not exist; make it with: python cli.py prepare pretrain --output FOLDER")
    folder = path if path.is_dir() else path.parent
    if (folder / INDEX).is_file():
        index = ShardIndex.load(folder / INDEX)
        if path.is_dir():
            return folder, index
        files = [file for file in index.files if file.name == path.name]
        if files:
            return folder, ShardIndex(**{**vars(index), "files": files})
    raw = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not raw:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise ShardError(f"{path} has neither {INDEX} nor *.bin files (it holds {inside}); give a shard folder")
    return folder, ShardIndex(
        dtype="uint16", vocab_size=None, eos_id=None, tokenizer_sha256=None, files=[_raw_file(f) for f in raw]
    )


def _raw_file(path: Path) -> ShardFile:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ShardError(
            f"{path} has {size} bytes, no positive whole number of 2-byte tokens: without an {INDEX} a"
            " file must be raw uint16; copy it again, or prepare the text"
        )
    return ShardFile(name=path.name, num_tokens=size // 2)


class ShardFileWriter:
    """One `.bin` file, which appears when it is closed: whole, and on the disk.

    Args:
        path: of the file; an older one is replaced.
        dtype: uint16 or uint32.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._stream: BinaryIO = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self.num_tokens = self._bytes = self._chars = self._documents = 0

    def write(self, tokens: NDArray[Any], *, num_bytes: int = 0, num_chars: int = 0, num_documents: int = 0) -> None:
        """Append tokens (N,), the encoding of text of that many bytes, characters and documents."""
        data = memoryview(tokens.astype(self.dtype, copy=False)).cast("B")
        self._stream.write(data)
        self._hash.update(data)
        self.num_tokens += len(tokens)
        self._bytes, self._chars = self._bytes + num_bytes, self._chars + num_chars
        self._documents += num_documents

    def close(self) -> ShardFile:
        """Make the file appear, and say what it holds."""
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        os.replace(self._partial, self._path)
        return ShardFile(
            name=self._path.name,
            num_tokens=self.num_tokens,
            num_bytes=self._bytes,
            num_chars=self._chars,
            num_documents=self._documents,
            sha256=self._hash.hexdigest(),
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # a full disk can fail once more here
            self._stream.close()
        self._partial.unlink(missing_ok=True)


def shard_dtype(vocab_size: int) -> str:
    """The type that token ids below `vocab_size` are kept in."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class ShardWriter:
    """Write token sequences into a new shard folder, which appears only when the `with` block ends well.

    Args:
        folder: where the shards go; must not exist.
        vocab_size: ids are below this; decides between uint16 and uint32.
        eos_id: the token that ends a document.
        tokenizer_sha256: fingerprint of the tokenizer, None if there is none.
        shard_tokens: a new file is begun after this many tokens.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a token id outside the vocabulary.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str | None = None,
        shard_tokens: int = 100_000_000,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists; remove it or choose another folder")
        if shard_tokens < 1 or not 0 <= eos_id < vocab_size <= 2**32:
            raise ValueError(f"impossible shards: {vocab_size=}, {eos_id=}, {shard_tokens=}")
        self.index = ShardIndex(
            dtype=shard_dtype(vocab_size), vocab_size=vocab_size, eos_id=eos_id, tokenizer_sha256=tokenizer_sha256
        )
        self._shard_tokens = shard_tokens
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._begin()
        return self

    def write(
        self, tokens: NDArray[Any] | list[int], *, num_bytes: int = 0, num_chars: int = 0, num_documents: int = 0
    ) -> None:
        """Append `tokens` (N,), the encoding of text of that many bytes, characters and documents."""
        array = np.asarray(tokens)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < (self.index.vocab_size or 0):
            raise ValueError(f"token ids must lie in [0, {self.index.vocab_size}); got {array.min()}..{array.max()}")
        for piece in self._pieces(array):
            self._file.write(piece)
        self._file.write(array[:0], num_bytes=num_bytes, num_chars=num_chars, num_documents=num_documents)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.index.files.append(self._file.close())
            self.index.save(self._partial)
            os.replace(self._partial, self.folder)
        else:
            self._file.discard()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _pieces(self, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
        while len(array):
            if self._file.num_tokens == self._shard_tokens:
                self.index.files.append(self._file.close())
                self._begin()
            room = self._shard_tokens - self._file.num_tokens
            yield array[:room]
            array = array[room:]

    def _begin(self) -> None:
        path = self._partial / f"shard-{len(self.index.files):05d}.bin"
        self._file = ShardFileWriter(path, self.index.dtype)
