"""Files and folders that take the place of others whole or not at all, whenever process or machine end.

A file replaces a file in one step. The system has no such step for a folder: the old one is moved aside first, under
a name that `--ckpt_path last` finds too, and goes away once the new one is in its place.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where what is going to replace `path` is written: beside it, under no name of a checkpoint."""
    return path.with_name(f".{path.name}.partial")


def previous_of(path: Path) -> Path:
    """Where a folder at `path` stands for the moment in which another takes its place."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def take_place(path: Path) -> None:
    """Put what was written to `partial_of(path)` in the place of `path`, once it is on the disk."""
    partial, previous = partial_of(path), previous_of(path)
    _sync_content(partial)
    if path.is_dir() or (partial.is_dir() and path.exists()):
        remove(previous)
        path.rename(previous)
    partial.replace(path)
    sync(path.parent)
    if previous.exists():
        previous.rename(partial)  # a half-removed folder must not look like a checkpoint
        remove(partial)


def standing(path: Path) -> Path:
    """Where what is meant by `path` is to be read: where a `take_place` was killed between its two moves, the old one.

    Nothing is moved back, since that process may be alive.
    """
    return previous_of(path) if not path.exists() and previous_of(path).exists() else path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_content(path: Path) -> None:
    """Of a file, or of all files and folders in a folder: without power, the name could outlast what it names."""
    if not path.is_dir():
        sync(path)
    for folder, _, files in os.walk(path):
        for name in (*files, ""):
            sync(Path(folder, name))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place to write what replaces `path` when the `with` block ends well; if it does not, nothing changes."""
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        take_place(path)
    except BaseException as error:
        remove(partial)  # a full disk needs the room
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write that failed does not say where
        raise
