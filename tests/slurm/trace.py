"""A callback for runs in processes of their own: what each rank trains on, with one rank behind the others."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Trace(Callback):
    """Appends "step pid sum of the tokens" to `folder`/rank for every micro batch; rank 1 sleeps before each."""

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.folder, self.delay = folder, delay

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(self.delay)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / str(trainer.global_rank)).open("a") as file:
            file.write(f"{trainer.global_step} {os.getpid()} {batch['input_ids'].sum()}\n")
