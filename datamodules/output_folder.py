"""Folders that are made whole or not at all, and know what they were made with."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RECORD = "prepare.json"
LOCK = ".lock"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, beside `output`. It takes its place when the `with` block ends well, else it goes away.

    Raises:
        FileExistsError: another process is filling it.
    """
    partial, old = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another prepare is at work on {output}: wait for it or stop it") from None
    try:
        for entry in partial.iterdir():  # what a killed one left
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        (output / LOCK).unlink()  # only now: who comes in between finds no folder, and makes another
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def write_record(folder: Path, made_with: dict[str, Any], counts: dict[str, Any]) -> None:
    """Keep what `folder` was made with, for `is_done`, and what is in it."""
    (folder / RECORD).write_text(json.dumps({"made_with": made_with, "counts": counts}, indent=1) + "\n")


def is_done(output: Path, made_with: dict[str, Any], overwrite: bool, check: Callable[[], object]) -> bool:
    """Whether `output` already is what would be made; `check` raises ValueError or OSError if it is damaged.

    Raises:
        FileExistsError: it is anything else: the message says what differs.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / RECORD).is_file():
        # never to be replaced: it could be anybody's
        raise FileExistsError(f"{output} exists and was not made by prepare: choose another --output")
    try:
        before = json.loads((output / RECORD).read_text())["made_with"]
        changed = differences(before, made_with)
        check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        changed = [f"it is damaged ({error})"]
    if changed and not overwrite:
        raise FileExistsError(
            f"{output} exists, but {'; '.join(changed)}: choose another --output, or add --overwrite true"
        )
    return not changed


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two sets of arguments differ, in words."""
    return [f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value]
