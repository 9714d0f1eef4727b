"""Checkpoints that survive, whatever happens while they are written."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_modules import LanguageModel, LastCheckpoint
from lightning_modules.checkpoints import AtomicCheckpointIO, BackgroundCheckpointIO
from rat import ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]


# --- AtomicCheckpointIO


def broken_save(then: Callable[[], object]) -> Callable[..., None]:
    def save(content: object, file: Any) -> None:
        file.write(b"half a check")
        file.flush()
        then()

    return save


def assert_whole(path: Path, value: int) -> None:
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True) == {"value": value}


def test_a_save_that_fails_in_the_middle_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full() -> None:
        raise OSError("no space left")

    path, io = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"value": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken_save(disk_is_full))
        with pytest.raises(OSError, match="no space"):
            io.save_checkpoint({"value": 2}, path)
    assert_whole(path, 1)
    io.save_checkpoint({"value": 3}, path)
    assert_whole(path, 3)
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"], "what was left over is used up"


def test_a_process_killed_in_the_middle_of_a_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"value": 1}, path)
    child = os.fork()
    if child == 0:
        torch.save = broken_save(lambda: os.kill(os.getpid(), signal.SIGKILL))
        io.save_checkpoint({"value": 2}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_whole(path, 1)
    assert list(tmp_path.glob("*.ckpt")) == [path], "half a file must not look like a checkpoint"


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"value": 1}, path)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            io.save_checkpoint({"weights": torch.zeros(10_000)}, path)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert_whole(path, 1)
    assert list(tmp_path.iterdir()) == [path], "the room that it took is free again"


# --- BackgroundCheckpointIO


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait for it."""
    event, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: event.wait(10) and save(*arguments))
    return event


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, gate: threading.Event) -> None:
    first, second, io = tmp_path / "1.ckpt", tmp_path / "2.ckpt", BackgroundCheckpointIO()
    weights = torch.zeros(3)
    io.save_checkpoint({"weights": weights}, first)
    weights += 1  # what the next step does
    assert not first.exists()
    gate.set()
    assert not io.load_checkpoint(first, weights_only=True)["weights"].any()

    gate.clear()
    io.save_checkpoint({"weights": weights}, second)
    io.remove_checkpoint(first)
    assert first.exists(), "the old one stays until the new one is whole"
    gate.set()
    io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["2.ckpt"]


def test_a_background_save_that_fails_is_told_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def disk_is_full() -> None:
        asked.wait(10)
        raise OSError("no space left")

    path, io = tmp_path / "1.ckpt", BackgroundCheckpointIO()
    io.save_checkpoint({"value": 1}, path)
    io.teardown()
    monkeypatch.setattr(torch, "save", broken_save(disk_is_full))
    io.save_checkpoint({"value": 2}, tmp_path / "2.ckpt")
    io.remove_checkpoint(path)
    asked.set()
    with pytest.raises(OSError, match="no space"):
        io.teardown()
    assert_whole(path, 1)
    assert list(tmp_path.iterdir()) == [path]


# --- LastCheckpoint


class Saves(Callback):
    """After which steps the Trainer saved, in the order in which it did; after which it validated in between."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.all: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        self.all.append(f"validated {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        self.all.append("ended")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        self.steps.append(checkpoint["global_step"])
        self.all.append(f"saved {checkpoint['global_step']}")


@pytest.mark.parametrize(("max_steps", "saved"), [(7, [3, 6, 7]), (6, [3, 6]), (2, [2])])
def test_the_last_checkpoint_is_saved_every_n_steps_and_at_the_end(
    config: ModelConfig, ragged: Data, make_trainer: Make, max_steps: int, saved: list[int]
) -> None:
    saves = Saves()
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 2, "max_steps": max_steps}
    trainer = make_trainer(callbacks=[saves, LastCheckpoint(every_n_train_steps=3)], **options)
    trainer.fit(LanguageModel(config), ragged())
    assert saves.steps == saved
    folder = Path(trainer.log_dir, "checkpoints")
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == max_steps

    again = make_trainer(callbacks=[LastCheckpoint(3)], **options | {"max_steps": max_steps + 1})
    again.fit(LanguageModel(config), ragged(), ckpt_path="last")
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == max_steps + 1


def test_the_last_step_is_saved_when_all_else_is_done(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    saves = Saves()
    trainer = make_trainer(
        callbacks=[LastCheckpoint(every_n_train_steps=2), saves], enable_checkpointing=True, max_steps=4,
        val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(LanguageModel(config), ragged())
    assert saves.all == ["saved 2", "validated 2", "validated 4", "ended", "saved 4"]
