"""A run that was interrupted anywhere and resumed trains on exactly the samples that an unbroken run does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from datamodules.tokens import TokenDataModule

SEQ_LEN = 4
SAMPLES = 22  # two global batches of eight and six samples left over


class Recorder(LightningModule):
    """A model whose weight depends on which samples it saw, in which order and in which optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.fail_at: int | None = None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        samples = batch["input_ids"][:, 0] // SEQ_LEN
        self.seen += samples.tolist()
        return (self.weight - samples.float() / SAMPLES).square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val", batch["input_ids"].float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SaveEverywhere(Callback):
    """Write a checkpoint in every hook in which one could be asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, dict[Path, int]()

    def _save(self, trainer: Trainer, hook: str) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.steps):03d}-{hook}.ckpt"
            self.steps[path] = trainer.global_step
            trainer.save_checkpoint(path)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "train_start")

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "train_epoch_start")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._save(trainer, "train_batch_end")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "train_epoch_end")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "train_end")


def fit(
    data: Path,
    *,
    batch_size: int = 4,
    accumulate: int = 2,
    num_workers: int = 0,
    callbacks: list[Callback] | None = None,
    ckpt: Path | str | None = None,
    fail_at: int | None = None,
    seed: int = 0,
    seq_len: int = SEQ_LEN,
    **trainer_options: Any,
) -> tuple[Recorder, Trainer]:
    module = Recorder()
    module.fail_at = fail_at
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or []),
        use_distributed_sampler=False, accumulate_grad_batches=accumulate, callbacks=callbacks,
        **{"max_epochs": 3, **trainer_options},
    )  # fmt: skip
    datamodule = TokenDataModule(
        data, seq_len=seq_len, batch_size=batch_size, num_workers=num_workers, seed=seed
    )
    trainer.fit(module, datamodule, ckpt_path=ckpt)
    return module, trainer


@pytest.fixture
def data(counting: Callable[..., Path]) -> Path:
    return counting(SAMPLES * SEQ_LEN + 1, 9 * SEQ_LEN)


ENDS = {"epochs": {"max_epochs": 3}, "steps": {"max_epochs": -1, "max_steps": 6}, "cut": {"max_steps": 5}}
VALIDATION = {"none": {"limit_val_batches": 0}, "epoch": {}, "step": {"val_check_interval": 2}}


@pytest.mark.parametrize("validation", VALIDATION)
@pytest.mark.parametrize("end", ENDS)
def test_resume_from_every_hook(data: Path, tmp_path: Path, end: str, validation: str) -> None:
    options = {**ENDS[end], **VALIDATION[validation]}
    saver = SaveEverywhere(tmp_path)
    whole, trainer = fit(data, callbacks=[saver], **options)
    assert len(whole.seen) == 8 * trainer.global_step >= 40
    assert len(saver.steps) > 15
    for path, steps in saver.steps.items():
        resumed, again = fit(data, ckpt=path, **options)
        assert resumed.seen == whole.seen[8 * steps :], path.name
        assert again.global_step == trainer.global_step, path.name
        assert again.current_epoch == trainer.current_epoch, path.name
        assert resumed.weight.item() == whole.weight.item(), path.name
