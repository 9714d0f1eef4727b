"""A run that was interrupted anywhere and resumed trains on exactly the samples that an unbroken run does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from datamodules.tokens import TokenDataModule

SEQ_LEN = 4
SAMPLES = 22  # two global batches of eight, and six samples that padding fills up


class Recorder(LightningModule):
    """A model whose weight depends on which samples it saw, in which order and in which optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.validated: list[int] = []
        self.fail_at: int | None = None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        padded = (batch["labels"] == -100).all(dim=1)
        samples = torch.where(padded, -1, batch["input_ids"][:, 0] // SEQ_LEN)
        self.seen += samples.tolist()
        return (self.weight - samples.float() / SAMPLES).square().mean()

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.global_step)

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
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        use_distributed_sampler=False, accumulate_grad_batches=accumulate, callbacks=callbacks,
        **{"max_epochs": 3, **trainer_options},
    )  # fmt: skip
    datamodule = TokenDataModule(data, seq_len=seq_len, batch_size=batch_size, num_workers=num_workers, seed=seed)
    trainer.fit(module, datamodule, ckpt_path=ckpt)
    return module, trainer


@pytest.fixture
def data(counting: Callable[..., Path]) -> Path:
    return counting(SAMPLES * SEQ_LEN + 1, 9 * SEQ_LEN)


STOPS: dict[str, dict[str, Any]] = {
    "max_epochs": {"max_epochs": 3},
    "max_steps": {"max_epochs": -1, "max_steps": 8},
    "both": {"max_steps": 8},
}
VALIDATION: dict[str, dict[str, Any]] = {
    "never": {"limit_val_batches": 0},
    "every_epoch": {},
    "every_step": {"val_check_interval": 2},
    "over_epochs": {"val_check_interval": 6, "check_val_every_n_epoch": None},
}


def check(path: Path, steps: int, data: Path, whole: tuple[Recorder, Trainer], **options: Any) -> None:
    """Resume from `path`, written after `steps` optimiser steps, and compare with the unbroken run."""
    resumed, trainer = fit(data, ckpt=path, **options)
    assert resumed.seen == whole[0].seen[8 * steps :], path.name
    assert resumed.weight.item() == pytest.approx(whole[0].weight.item(), rel=1e-6), path.name
    assert trainer.global_step == whole[1].global_step, path.name
    # a validation that was due just when the checkpoint was written may be left out
    later = [[step for step in run.validated if step > steps] for run in (resumed, whole[0])]
    assert later[0] == later[1], path.name
    if resumed.seen:
        logged = [run.fit_loop.epoch_loop._batches_that_stepped for run in (trainer, whole[1])]
        assert logged[0] == logged[1], path.name
        assert trainer.current_epoch == whole[1].current_epoch, path.name


@pytest.mark.parametrize("validation", VALIDATION)
@pytest.mark.parametrize("stop", STOPS)
def test_resumes_from_every_hook(data: Path, tmp_path: Path, stop: str, validation: str) -> None:
    options = {**STOPS[stop], **VALIDATION[validation]}
    saver = SaveEverywhere(tmp_path)
    whole = fit(data, callbacks=[saver], **options)
    assert len(whole[0].seen) == 8 * whole[1].global_step == (72 if stop == "max_epochs" else 64)
    assert sorted(whole[0].seen[:24]) == sorted(whole[0].seen[24:48]) == [-1, -1, *range(SAMPLES)]
    assert len(saver.steps) >= 20
    for path, steps in saver.steps.items():
        check(path, steps, data, whole, **options)


@pytest.mark.parametrize("stop", [{"max_steps": 3}, {"max_steps": 5}, {"max_steps": 4}, {"max_epochs": 1}])
def test_a_run_that_was_cut_short_can_be_extended(data: Path, tmp_path: Path, stop: dict[str, int]) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data, callbacks=[saver], **stop)
    whole = fit(data)
    for path, steps in saver.steps.items():
        check(path, steps, data, whole)


@pytest.mark.parametrize(("workers", "later"), [(0, 2), (2, 0), (2, 2)])
def test_read_ahead_is_not_training(data: Path, tmp_path: Path, workers: int, later: int) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(data, callbacks=[saver], num_workers=workers)
    for steps in (1, 2, 5):
        check(tmp_path / f"step={steps}.ckpt", steps, data, whole, num_workers=later)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("validation", ["never", "every_epoch"])
def test_another_micro_batch(data: Path, tmp_path: Path, batch_size: int, accumulate: int, validation: str) -> None:
    saver = SaveEverywhere(tmp_path)
    whole = fit(data, callbacks=[saver], **VALIDATION[validation])
    for path, steps in saver.steps.items():
        check(path, steps, data, whole, batch_size=batch_size, accumulate=accumulate, **VALIDATION[validation])


@pytest.mark.parametrize("fail_at", [0, 4, 16, 20, 28, 44])
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_by_hand(data: Path, tmp_path: Path, fail_at: int, workers: int) -> None:
    saver = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(SystemExit):
        fit(data, callbacks=[saver], fail_at=fail_at, num_workers=workers)
    check(Path(saver.ckpt_path), fail_at // 8, data, fit(data), num_workers=workers)


def test_limited_epochs(data: Path, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    whole = fit(data, callbacks=[saver], limit_train_batches=2)
    assert len(whole[0].seen) == 24
    for path, steps in saver.steps.items():
        check(path, steps, data, whole, limit_train_batches=2)


def test_fitting_again_goes_on(data: Path) -> None:
    whole, _ = fit(data)
    first, trainer = fit(data, max_steps=3)
    datamodule = trainer.datamodule
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(first, datamodule)
    assert first.seen == whole.seen


@pytest.mark.parametrize("other", [{"seed": 1}, {"seq_len": 5}])
def test_other_data_is_refused(data: Path, tmp_path: Path, other: dict[str, int]) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data, callbacks=[saver], max_steps=1)
    with pytest.raises(ValueError, match=r"trained with .*this run has .*same total_samples, seed, shuffle, seq_len"):
        fit(data, ckpt=next(iter(saver.steps)), **other)


def test_another_global_batch_is_refused_where_it_does_not_fit(data: Path, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data, callbacks=[saver], max_steps=1)
    with pytest.raises(ValueError, match=r"after 8 samples.*keep the global batch"):
        fit(data, ckpt=list(saver.steps)[-1], accumulate=4)


def test_validating_needs_no_position(data: Path, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    module, _ = fit(data, callbacks=[saver], max_steps=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(module, TokenDataModule(data, seq_len=3, batch_size=1), ckpt_path=list(saver.steps)[-1])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(data: Path, tmp_path: Path, before: int, after: int) -> None:
    ranks: dict[int, dict[str, Any]] = {
        1: {"accumulate": 2},
        2: {"accumulate": 1, "devices": 2, "strategy": "ddp_fork"},
    }
    fit(data, callbacks=[SaveEverywhere(tmp_path)], max_steps=3, **ranks[before])
    (path,) = tmp_path.glob("*-train_end.ckpt")
    whole, reference = fit(data)
    resumed, trainer = fit(data, ckpt=path, **ranks[after])
    if after == 1:
        assert resumed.seen == whole.seen[24:]
        assert trainer.global_step == reference.global_step
    # the weight remembers every sample and the step it was in; of two ranks only that comes back
    assert resumed.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6)
