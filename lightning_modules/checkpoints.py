"""Checkpoints that survive: written whole or not at all, at once or in the background, and the last one at hand."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_modules.atomic import replacing, standing
from lightning_modules.run_folder import reached_end
from lightning_modules.sharded_checkpoints import read_folder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whenever the process is killed.

    Lightning's own writes to the temporary folder and moves, which is a copy where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside `path`, then rename. Raises OSError where the disk is full; what was there stays."""
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # what it makes of a write that failed, such as for a full disk
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's, and a folder of shards is put together. Raises ValueError for what is no whole checkpoint."""
        path = standing(Path(path))
        if path.is_dir():
            return read_folder(path)
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, UnpicklingError, LookupError, ValueError):  # files of other kinds raise any
            raise ValueError(f"{path} is damaged or no checkpoint: copy it again, or give another") from None


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Checkpoints written by a thread while training goes on: atomically, in order, the last before the process ends.

    It takes memory for one copy of weights and optimiser, on the device where they are. An error of a save is raised
    at the next one, or at the end. For strategies that write one file; those that write shards do not ask it.
    """

    def __init__(self) -> None:
        super().__init__(AtomicCheckpointIO())

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Copy the checkpoint and let the thread write it, once it has written the one before."""
        self.teardown()
        super().save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove an old checkpoint once the new one is whole, and only then."""
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(lambda: self._error or AtomicCheckpointIO().remove_checkpoint(path))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `AtomicCheckpointIO.load_checkpoint`, once all are written."""
        self.teardown()
        return super().load_checkpoint(*args, **kwargs)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` in the run's folder, every n optimiser steps and at the end; `--ckpt_path last` resumes from it.

    The last step is saved when all else is done: after its validation, the export of the model and the final metrics.
    A run that is killed before goes on from the checkpoint before, and does not leave them out.

    Args:
        every_n_train_steps: how much work an interruption may cost, in optimiser steps.
        dirpath: where, if not in the folder `checkpoints` of the logger's.
    """

    def __init__(self, every_n_train_steps: int = 1000, dirpath: Path | None = None) -> None:
        super().__init__(
            dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save every n steps."""
        if not reached_end(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too, wherever it falls."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
