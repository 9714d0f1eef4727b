"""What a run leaves in its folder, however it ends."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules import LanguageModel, RunRecord, run_record
from rat import ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]


class Interrupt(Callback):
    """Raises at the start of a micro batch."""

    def __init__(self, error: BaseException, batch_idx: int) -> None:
        self.error, self.batch_idx = error, batch_idx

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            raise self.error


@pytest.fixture
def fit(config: ModelConfig, ragged: Data, make_trainer: Make, folder: Path) -> Callable[..., dict[str, Any]]:
    """Train for some steps with a RunRecord; its summary, whatever happens."""

    def run(*callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
        trainer = make_trainer(callbacks=[*callbacks, RunRecord()], **options)
        try:
            trainer.fit(LanguageModel(config), ragged(), ckpt_path=ckpt_path)
        except (Exception, SystemExit):
            assert callbacks
        return json.loads((folder / "summary.json").read_text())

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log" / "version_0"


Fit = Callable[..., dict[str, Any]]


def test_a_finished_run(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    losses = iter([3.0, 2.0, 2.5])
    log = Callback()
    log.on_validation_epoch_end = lambda trainer, module: module.log("val/loss", next(losses))  # type: ignore[method-assign]
    monkeypatch.setattr(LanguageModel, "_log_metrics", lambda *_: None)
    summary = fit(log, max_steps=3, accumulate_grad_batches=2, val_check_interval=2)
    assert (summary["status"], summary["error"]) == ("finished", None)
    assert (summary["steps"], summary["max_steps"], summary["tokens"]) == (3, 3, 3 * 2 * 2 * 12)
    assert summary["val_loss"] == {"last": 2.5, "best": 2.0, "best_step": 2}
    assert summary["training_seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(144 / summary["training_seconds"])
    assert summary["peak_memory"] > 1e7
    assert (summary["restarts"], summary["skipped_steps"]) == (0, 0)
    (start,) = summary["starts"]
    assert (start["first_step"], start["last_step"]) == (0, 3)
    assert start["environment"]["torch"] == torch.__version__
    assert start["environment"]["threads"] == torch.get_num_threads()
    assert start["data"] is None, "these samples come from no shards"
    assert (start["environment"]["world_size"], start["environment"]["slurm_job"]) == (1, "17")


def test_validation_takes_no_time_of_training(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, hours = [0.0], Callback()

    def go_on(seconds: float) -> Callable[..., None]:
        return lambda *_: clock.append(clock[-1] + seconds)

    monkeypatch.setattr(run_record, "time", types.SimpleNamespace(monotonic=lambda: clock[-1]))
    hours.on_validation_batch_start = go_on(3600)  # type: ignore[method-assign]
    hours.on_train_batch_start = go_on(2)  # type: ignore[method-assign]
    summary = fit(hours, val_check_interval=2)
    assert (summary["training_seconds"], summary["tokens_per_second"]) == (3 * 2, 72 / 6)


def test_a_failed_run_says_with_what_and_where(fit: Fit, folder: Path) -> None:
    summary = fit(Interrupt(RuntimeError("out of luck\nand more"), 2))
    assert (summary["status"], summary["error"], summary["steps"]) == ("failed", "RuntimeError: out of luck", 2)
    text = (folder / "errors" / "rank-0.log").read_text()
    assert "rank 0: step 2, epoch 0, micro batch 2" in text
    assert "raise self.error\nRuntimeError: out of luck\nand more\n" in text


@pytest.mark.parametrize("error", [SystemExit(75), KeyboardInterrupt()])
def test_a_run_that_is_told_to_stop_has_not_failed(fit: Fit, folder: Path, error: BaseException) -> None:
    summary = fit(Interrupt(error, 1))
    assert (summary["status"], summary["error"], summary["steps"]) == ("stopped", None, 1)
    assert not (folder / "errors").exists()


def test_training_that_a_callback_ends_early_is_stopped(fit: Fit) -> None:
    early = Callback()
    early.on_train_batch_end = lambda trainer, *_: setattr(trainer, "should_stop", True)  # type: ignore[method-assign]
    summary = fit(early)
    assert (summary["status"], summary["steps"]) == ("stopped", 1)


def test_epochs_come_to_an_end_too(fit: Fit) -> None:
    summary = fit(max_steps=-1, max_epochs=1)
    assert (summary["status"], summary["steps"]) == ("finished", 6)


def test_it_is_kept_up_at_validation_and_checkpoints(fit: Fit, folder: Path) -> None:
    seen = []

    def look(trainer: Trainer, *_: Any) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        seen.append((trainer.global_step, summary["steps"], summary["status"], summary["val_loss"] is not None))

    watch = Callback()
    watch.on_train_batch_start = look  # type: ignore[method-assign]
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1)
    fit(watch, checkpoint, enable_checkpointing=True, max_steps=4, val_check_interval=3)
    assert seen == [(0, 0, "running", False), *((n, n, "running", n == 3) for n in (1, 2, 3))]


def test_a_run_that_goes_on_keeps_what_was_before(fit: Fit, folder: Path) -> None:
    first = fit(Interrupt(RuntimeError("lost"), 3), ModelCheckpoint(folder, every_n_train_steps=2), max_steps=5,
                enable_checkpointing=True, val_check_interval=2)  # fmt: skip
    (path,) = folder.glob("*.ckpt")
    # as if the process had been killed instead
    first["status"] = first["starts"][0]["status"] = "running"
    (folder / "summary.json").write_text(json.dumps(first))
    seen, watch = [], Callback()
    watch.on_train_batch_start = lambda *_: seen.append(json.loads((folder / "summary.json").read_text()))  # type: ignore[method-assign]
    summary = fit(watch, ckpt_path=path, max_steps=5, val_check_interval=1.0)
    assert (seen[0]["steps"], seen[0]["tokens"], seen[0]["status"]) == (2, 2 * 24, "running")
    assert (summary["status"], summary["steps"], summary["restarts"]) == ("finished", 5, 1)
    assert [start["status"] for start in summary["starts"]] == ["killed", "finished"]
    assert [(start["first_step"], start["last_step"]) for start in summary["starts"]] == [(0, 3), (2, 5)]
    assert summary["val_loss"] == first["val_loss"], "the second start validated nothing"
    seconds = [start["training_seconds"] for start in summary["starts"]]
    assert summary["training_seconds"] == pytest.approx(sum(seconds))
    assert summary["tokens_per_second"] == pytest.approx(3 * 24 / seconds[1])


def test_a_run_that_was_killed_after_its_last_save_is_finished_by_the_next_call(fit: Fit, folder: Path) -> None:
    first = fit(ModelCheckpoint(folder, every_n_train_steps=5), max_steps=5, enable_checkpointing=True)
    (path,) = folder.glob("*.ckpt")
    killed = first | {"status": "running", "starts": [first["starts"][0] | {"status": "running"}]}
    (folder / "summary.json").write_text(json.dumps(killed))
    assert fit(ckpt_path=path, max_steps=5) == first

    (folder / "summary.json").write_text(json.dumps(killed | {"steps": 4}))
    assert fit(ckpt_path=path, max_steps=5)["status"] == "running", "of another checkpoint"


def test_training_anew_forgets_what_was_validated(fit: Fit) -> None:
    assert fit(val_check_interval=1)["val_loss"] is not None
    summary = fit(limit_val_batches=0)
    assert (summary["val_loss"], summary["restarts"]) == (None, 1)


def test_a_summary_that_cannot_be_written_ends_no_run(fit: Fit, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    written = fit()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match=r"summary\.json is not up to date: .*No space left"):
        assert fit() == written


def test_a_fast_dev_run_leaves_nothing(config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(callbacks=RunRecord(), fast_dev_run=1).fit(LanguageModel(config), ragged())
    assert not list(tmp_path.rglob("summary.json"))
