"""Folders that appear whole, and are filled by one process at a time."""

import contextlib
from pathlib import Path

import pytest

from datamodules.output_folder import LOCK, whole_folder


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with whole_folder(output) as folder:
        (folder / "a").write_text("new")
        assert not output.exists()
    assert (output / "a").read_text() == "new"
    with whole_folder(output) as folder:
        (folder / "b").write_text("newer")
    assert {path.name for path in output.iterdir()} == {"b"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with contextlib.suppress(RuntimeError), whole_folder(output) as folder:
        (folder / "a").touch()
        raise RuntimeError
    assert {path.name for path in tmp_path.rglob("*")} == {"out"}


def test_what_a_killed_one_left_goes_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial" / "below"
    left.mkdir(parents=True)
    (left.parent / "file").touch()
    with whole_folder(tmp_path / "out") as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not list((tmp_path / "out").iterdir())


def test_a_second_one_is_told(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        with pytest.raises(FileExistsError, match="another prepare is at work on"), whole_folder(tmp_path / "out"):
            pass
        assert (folder / "a").exists()
    assert (tmp_path / "out" / "a").exists()
