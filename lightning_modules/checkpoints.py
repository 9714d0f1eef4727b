"""Checkpoints that survive: written whole or not at all, and the last one at hand."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whenever the process is killed.

    Lightning's own writes to the temporary folder and moves, which is a copy where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside `path`, then rename."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's. Raises ValueError for a file that is no whole checkpoint."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, UnpicklingError):
            raise ValueError(f"{path} is damaged or no checkpoint: copy it again, or give another") from None


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` in the run's folder, every n optimiser steps and at the end; `--ckpt_path last` resumes from it.

    Args:
        every_n_train_steps: how much work an interruption may cost, in optimiser steps.
        dirpath: where, if not in the folder `checkpoints` of the logger's.
    """

    def __init__(self, every_n_train_steps: int = 1000, dirpath: Path | None = None) -> None:
        super().__init__(
            dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too, wherever it falls."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
