"""Callbacks for runs in processes of their own: what each rank trains on, with the last rank behind the others."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Trace(Callback):
    """Appends "step pid sum of the tokens" to `folder`/rank for every micro batch.

    The last rank sleeps before each, until there is a file `folder`/hurry.
    """

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.folder, self.delay = folder, delay

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1 and not (self.folder / "hurry").exists():
            time.sleep(self.delay)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / str(trainer.global_rank)).open("a") as file:
            file.write(f"{trainer.global_step} {os.getpid()} {batch['input_ids'].sum()}\n")


class Late(Callback):
    """Rank 0 ends long after the others."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.global_rank == 0:
            time.sleep(6)
