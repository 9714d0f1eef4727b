"""What replaces something is whole, or what it replaces is still there: killed before every call that changes names."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.atomic import replacing, standing


def write(path: Path, kind: str, content: str) -> None:
    if kind == "folder":
        path.mkdir()
        for name in ("one", "two"):
            (path / name).write_text(content)
    else:
        path.write_text(content)


def read(path: Path) -> set[str]:
    files = [path / "one", path / "two"] if path.is_dir() else [path]
    return {file.read_text() for file in files}


def killed_before(call: int, names: tuple[str, ...], then: Callable[[], object]) -> bool:
    """Run `then` in a process that is killed before its call number `call` of os functions; whether it came so far."""
    child = os.fork()
    if child == 0:
        counted = iter(range(call))

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(counted, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return wrapped

        for name in names:
            setattr(os, name, wrap(getattr(os, name)))
        then()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_there_is_always_a_whole_one(tmp_path: Path, before: str, after: str) -> None:
    def replace() -> None:
        with replacing(path) as partial:
            write(partial, after, "new")

    call, names = 0, ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
    while True:
        folder = tmp_path / str(call)
        folder.mkdir()
        path = folder / "last.ckpt"
        write(path, before, "old")
        killed = killed_before(call, names, replace)
        assert read(standing(path)) in ({"old"}, {"new"})
        found = [other for other in folder.iterdir() if other.name.startswith("last") and other.suffix == ".ckpt"]
        newest = max(found, key=lambda other: other.stat().st_mtime)  # what `--ckpt_path last` takes
        assert read(newest) in ({"old"}, {"new"})
        replace()
        assert read(path) == {"new"}
        assert [other.name for other in folder.iterdir()] == ["last.ckpt"], "what was left over is used up"
        if not killed:
            break
        call += 1
    assert call > 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_named_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls: list[tuple[str, str]] = []

    def watch(name: str, where: Callable[[Any], Path]) -> None:
        original = getattr(os, name)

        def watched(place: Any, *args: Any) -> None:
            calls.append((name, str(where(place).relative_to(tmp_path))))
            original(place, *args)

        monkeypatch.setattr(os, name, watched)

    path = tmp_path / "last.ckpt"
    write(path, kind, "old")
    watch("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")))
    for name in ("rename", "replace", "unlink"):
        watch(name, Path)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: calls.append(("rmtree", folder.name)))
    with replacing(path) as partial:
        write(partial, kind, "new")
    content = [partial.name] if kind == "file" else [f"{partial.name}/{name}" for name in ("one", "two")]
    first = calls[: calls.index(("replace", partial.name))]
    assert {name for call, name in first if call == "fsync"} == {*content, partial.name}
    then = calls[len(first) + 1 :]
    assert then[0] == ("fsync", "."), "the new name, before the old content goes"
    assert (("rename", "last.previous.ckpt") in then) == (kind == "folder")


def test_what_fails_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, "folder", "old")

    def fill_the_disk() -> None:
        with replacing(path) as partial:
            write(partial, "folder", "half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match=rf"full: '{path}'"):
        fill_the_disk()
    assert read(path) == {"old"}
    assert list(tmp_path.iterdir()) == [path]
    shutil.rmtree(path)
    assert standing(path) == path, "the error is to name what was asked for"
