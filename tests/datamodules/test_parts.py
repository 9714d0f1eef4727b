"""Work that is killed, crowded or runs out of disk loses at most one part, and ends with the same bytes."""

import contextlib
import fcntl
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datamodules.parts as module
from datamodules.pretraining import merge, prepare_pretrain
from datamodules.shards import ShardError, ShardFileWriter, TokenShards

ROOT = Path(module.__file__).parents[1]
TEXTS = [f"Document {i} tells of {'many ' * (i % 7)} things." for i in range(200)]
OPTIONS: dict[str, Any] = {"vocab_size": 280, "held_out": 0.1, "shard_tokens": 120, "num_processes": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(2):
        rows = (json.dumps({"text": text}) + "\n" for text in TEXTS[100 * i : 100 * i + 100])
        (folder / f"{i}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.text_sources._UNIT_BYTES", 1)


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted call makes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datamodules.text_sources._UNIT_BYTES", 1)
        prepare_pretrain(output, str(source), **OPTIONS)
    return files_of(output)


class Killed(BaseException):
    """What nothing catches."""


def dying(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`function`, which is killed in the middle of the given call."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["write", "close", "replace", "rename"]), st.integers(0, 40)), max_size=5))
def test_killed_anywhere_and_called_again(
    source: Path, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[str, int]]
) -> None:
    output = tmp_path_factory.mktemp("killed") / "out"
    for place, calls in kills:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            owner = ShardFileWriter if place in ("write", "close") else Path
            patch.setattr(owner, place, dying(getattr(owner, place), calls))
            prepare_pretrain(output, str(source), **OPTIONS)
        for split in ("train", "val"):  # what can be seen is whole
            if (output / split).exists():
                TokenShards(output / split).verify()
    prepare_pretrain(output, str(source), **OPTIONS)
    assert files_of(output) == whole


def test_nothing_is_made_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(ShardFileWriter, "close", dying(ShardFileWriter.close, 9))
        prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    before = {path: path.stat().st_ino for path in (tmp_path / "out/.parts/train").glob("[!.]*.bin")}
    monkeypatch.setattr("datamodules.pretraining.train_tokenizer", None)
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out/train").glob("*.bin")}
    finished = [path for path in before if before[path] == after[path.name]]
    assert len(finished) >= len(before) - 1 >= 3


COMMAND = """
import sys, datamodules.text_sources
from pathlib import Path
from datamodules.pretraining import prepare_pretrain
if __name__ == "__main__":
    datamodules.text_sources._UNIT_BYTES = 1
    prepare_pretrain(Path(sys.argv[1]), sys.argv[2], vocab_size=280, held_out=0.1, shard_tokens=120, num_processes=2)
"""


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_real_kill_leaves_no_process_and_loses_nothing(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(COMMAND)
    arguments = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out"), str(source)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    draw = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while process.poll() is None and len(workers := children(process.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.wait()
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    subprocess.run(arguments, env=environment, stderr=subprocess.DEVNULL, check=True)
    assert files_of(tmp_path / "out") == whole


def test_half_finished_work_is_not_mixed_with_other_work(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    def stop(**options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(ShardFileWriter, "close", dying(ShardFileWriter.close, 5))
            prepare_pretrain(tmp_path / "out", str(source), **{**OPTIONS, **options})

    stop(seed=1)
    with pytest.raises(FileExistsError, match=r"stands half-way, but seed was 1, is 0.*add --overwrite"):
        prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    stop(overwrite=True)
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    assert files_of(tmp_path / "out") == whole


def test_what_was_finished_stays_until_its_successor_is(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(ShardFileWriter, "close", dying(ShardFileWriter.close, 5))
        prepare_pretrain(tmp_path / "out", str(source), **{**OPTIONS, "seed": 1, "overwrite": True})
    kept = {name: data for name, data in files_of(tmp_path / "out").items() if not name.startswith(".parts")}
    assert kept == whole


@pytest.mark.parametrize("name", ["plan", "unit-00001"])
def test_two_at_once_are_told_apart(source: Path, tmp_path: Path, name: str, whole: dict[str, bytes]) -> None:
    (tmp_path / "out" / ".parts").mkdir(parents=True)
    with (tmp_path / "out" / ".parts" / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match=rf"another prepare is at work on {name} of .*out: wait for it or stop it"):
            prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    assert files_of(tmp_path / "out") == whole


FULL = """
import resource, sys
from pathlib import Path
from datamodules.pretraining import prepare_pretrain
if __name__ == "__main__":
    given = sys.argv[3]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
    prepare_pretrain(Path(sys.argv[1]), sys.argv[2], tokenizer=given, held_out=0.1, num_processes=1)
"""


def test_a_full_disk_is_one_clear_error(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "run.py").write_text(FULL)
    (tmp_path / "tokenizer.json").write_bytes(whole["tokenizer.json"])
    arguments = [str(tmp_path / "out"), str(source), str(tmp_path / "tokenizer.json")]
    run = [sys.executable, str(tmp_path / "run.py"), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    limit = len(whole["tokenizer.json"]) + 100
    texts = tmp_path / "long"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(200)))
    run[3] = str(texts)
    done = subprocess.run([*run, str(limit)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"the disk of {tmp_path / 'out'} is full: free some space and give the same command again" in done.stderr
    assert not list((tmp_path / "out" / ".parts").rglob("*.bin"))
    with pytest.raises(ValueError, match="units are not finished"):
        merge(tmp_path / "out")
    subprocess.run([*run, str(1 << 30)], env=environment, capture_output=True, check=True)
    TokenShards(tmp_path / "out" / "train").verify()


def test_the_rest_of_a_plan_that_is_gone_belongs_to_nothing(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(ShardFileWriter, "close", dying(ShardFileWriter.close, 9))
        prepare_pretrain(tmp_path / "out", str(source), **{**OPTIONS, "seed": 1})
    (tmp_path / "out" / ".parts" / "plan.json").unlink()  # as a kill in the middle of --overwrite leaves it
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    assert files_of(tmp_path / "out") == whole


def test_work_is_not_overwritten_under_a_worker(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(whole["tokenizer.json"])
    given = {**OPTIONS, "tokenizer": str(tokenizer), "num_workers": 1}
    work = module.WorkFolder(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(ShardFileWriter, "close", dying(ShardFileWriter.close, 5))
        prepare_pretrain(tmp_path / "out", str(source), **given)
    before = files_of(tmp_path / "out")
    with work.lock("plan", shared=True), pytest.raises(ShardError, match="another prepare is at work on plan"):
        prepare_pretrain(tmp_path / "out", str(source), **{**given, "seed": 1, "overwrite": True})
    assert files_of(tmp_path / "out") == before


def test_no_old_split_stands_beside_a_new_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_pretrain(tmp_path / "out", str(source), **OPTIONS)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(module.WorkFolder, "_place", dying(module.WorkFolder._place, 1))
        prepare_pretrain(tmp_path / "out", str(source), **{**OPTIONS, "seed": 1, "overwrite": True})
    assert (tmp_path / "out" / "train").is_dir()
    assert not (tmp_path / "out" / "val").exists()
    prepare_pretrain(tmp_path / "out", str(source), **{**OPTIONS, "seed": 1})
    TokenShards(tmp_path / "out" / "val").verify()
