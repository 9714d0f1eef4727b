"""Checkpoints that survive, whatever happens while they are written."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_modules import LanguageModel, LastCheckpoint
from lightning_modules.checkpoints import AtomicCheckpointIO
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


# --- LastCheckpoint


class Saves(Callback):
    """After which steps the Trainer saved, in the order in which it did."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        self.steps.append(checkpoint["global_step"])


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
