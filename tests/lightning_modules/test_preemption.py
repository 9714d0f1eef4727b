"""A run that is told to stop does so after a whole optimiser step, and goes on to the same weights."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from datamodules.tokens import TokenDataModule
from lightning_modules import LanguageModel, LastCheckpoint, Preemption, preemption, slurm
from lightning_modules.preemption import EXIT_STATUS, SIGNALS, Preempted
from rat import ModelConfig

Make = Callable[..., Trainer]
Logged = Callable[[str], list[float]]
CONFIG = ModelConfig(
    vocab_size=64, d_model=16, num_layers=1, num_heads=2, pattern=["rat"], chunk_size=4, max_seq_len=16
)
ALL = (*SIGNALS, signal.SIGINT)


@pytest.fixture(autouse=True)
def _own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Kill(Callback):
    """This process gets a signal while it trains on a micro batch; afterwards, the steps that were seen."""

    def __init__(self, number: int = signal.SIGTERM, at: int = -1, times: int = 1) -> None:
        self.number, self.at, self.times, self.seen = number, at, times, []

    def on_before_backward(self, trainer: Trainer, pl_module: LanguageModel, loss: torch.Tensor) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append((trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step))


@pytest.fixture
def fit(make_trainer: Make, random_shards: Path, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Six steps of two micro batches from the last checkpoint on; returns the weights."""

    def run(*callbacks: Callback, every: int = 100, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        defaults = {"max_steps": 6, "accumulate_grad_batches": 2, "enable_checkpointing": True, "limit_val_batches": 0}
        saver = LastCheckpoint(every, tmp_path / "checkpoints")
        trainer = make_trainer(callbacks=[*callbacks, saver], use_distributed_sampler=False, **defaults | options)
        module, data = LanguageModel(CONFIG), TokenDataModule(random_shards, seq_len=16, batch_size=2)
        trainer.fit(module, data, ckpt_path="last")
        return {name: x.clone() for name, x in module.state_dict().items()}

    return run


def saved_step(tmp_path: Path) -> int:
    return torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize(("micro_batch", "step"), [(4, 3), (5, 3), (9, 5)])
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    fit: Any, tmp_path: Path, number: int, micro_batch: int, step: int
) -> None:
    whole = fit(Kill())
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    kill = Kill(number, micro_batch)
    with pytest.raises(Preempted) as stop:
        fit(Preemption(), kill)
    assert stop.value.code == EXIT_STATUS == os.EX_TEMPFAIL
    assert kill.seen[-1] == (2 * step - 1, step), "not in the middle of an accumulation, and not a step later"
    assert saved_step(tmp_path) == step
    resumed = fit(Preemption(), after := Kill())
    assert [seen[1] for seen in kill.seen[1::2] + after.seen[1::2]] == [1, 2, 3, 4, 5, 6]
    for name, x in whole.items():
        torch.testing.assert_close(resumed[name], x, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_in_the_last_step_leaves_nothing_out(fit: Any, tmp_path: Path, number: int) -> None:
    ended, watch = [], Callback()
    watch.on_validation_end = lambda trainer, _: ended.append(("validated", trainer.global_step))  # type: ignore[method-assign]
    watch.on_train_end = lambda trainer, _: ended.append(("ended", trainer.global_step))  # type: ignore[method-assign]
    fit(Preemption(), Kill(number, 11), watch, limit_val_batches=1, val_check_interval=12, check_val_every_n_epoch=None)
    assert ended == [("validated", 6), ("ended", 6)]
    assert saved_step(tmp_path) == 6


def test_a_signal_from_before_training_is_waited_with(fit: Any, tmp_path: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # of the whole process it would go to a thread of pytest's that has not blocked it, and end all
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    with pytest.raises(Preempted):
        fit(Preemption())
    assert saved_step(tmp_path) == 1


def test_a_second_signal_does_not_cut_the_end_short(fit: Any) -> None:
    with pytest.raises(Preempted):
        fit(Preemption(), Kill(at=0))
    for number in SIGNALS:
        os.kill(os.getpid(), number)


def test_ctrl_c_again_ends_at_once(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Preempted):
        fit(Preemption(), Kill(signal.SIGINT, 1, times=2))  # what torchrun passes on comes at once
    assert saved_step(tmp_path) == 1
    assert capfd.readouterr().err.count("Ctrl-C again ends at once, without saving") == 1
    monkeypatch.setattr(preemption, "_PATIENCE", 0)
    with pytest.raises(SystemExit) as stop:
        fit(Preemption(), Kill(signal.SIGINT, 3, times=2))
    assert not isinstance(stop.value, Preempted)
    assert saved_step(tmp_path) == 1


def test_the_step_it_stops_at_is_logged(fit: Any, logged: Logged) -> None:
    with pytest.raises(Preempted):
        fit(Preemption(), Kill(at=3))
    assert len(logged("train/loss")) == 2


def test_the_checkpoint_is_that_of_the_step_wherever_the_callback_stands(fit: Any, tmp_path: Path) -> None:
    class Count(Callback):
        state_key, steps = "count", 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, int]:
            return {"steps": self.steps}

    with pytest.raises(Preempted):
        fit(Preemption(), Count(), Kill(at=3))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["callbacks"]["count"] == {"steps": 4}


def test_signals_are_given_back(fit: Any) -> None:
    before = [signal.getsignal(number) for number in ALL]
    fit(Preemption())
    assert [signal.getsignal(number) for number in ALL] == before

    class Fail(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise RuntimeError("anything")

    with pytest.raises(RuntimeError, match="anything"):
        fit(Preemption(), Fail(), max_steps=7)
    assert [signal.getsignal(number) for number in ALL] == before


def test_something_has_to_save(make_trainer: Make, random_shards: Path) -> None:
    trainer = make_trainer(callbacks=Preemption(), use_distributed_sampler=False, enable_checkpointing=True)
    with pytest.raises(ValueError, match="Preemption needs a LastCheckpoint"):
        trainer.fit(LanguageModel(CONFIG), TokenDataModule(random_shards, seq_len=16, batch_size=2))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Preemption(margin=-1)


# --- the time of a SLURM job


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A SLURM job that ends in so many seconds, as asked for once and again; gives the list of requeues."""

    def make(*seconds: float) -> list[str]:
        ends, requeued = iter(seconds), []
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setattr(preemption, "end_of_job", lambda: time.time() + next(ends))
        monkeypatch.setattr(preemption, "requeue", lambda: requeued.append("7") or True)
        return requeued

    return make


class Sleep(Callback):
    """A second goes by before the third step is made."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            time.sleep(1)


def test_a_job_that_nears_its_end_is_requeued(fit: Any, job: Any, tmp_path: Path) -> None:
    requeued = job(60.9, 59)
    with pytest.raises(Preempted):
        fit(Preemption(margin=1), Sleep())
    assert requeued == ["7"]
    assert saved_step(tmp_path) == 3


@pytest.mark.parametrize("later", [1000, math.inf])
def test_an_end_that_was_put_off_is_noticed(fit: Any, job: Any, tmp_path: Path, later: float) -> None:
    requeued = job(60.9, later)
    fit(Preemption(margin=1), Sleep())
    assert not requeued
    assert saved_step(tmp_path) == 6


def test_a_job_shorter_than_the_margin_is_refused(fit: Any, job: Any) -> None:
    job(100)
    with pytest.raises(ValueError, match="ends in 2 minutes, and Preemption stops 3 minutes"):
        fit(Preemption())


# --- what Slurm is asked


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Slurm's commands, of which squeue answers this; gives the file that names the calls."""

    def make(answer: str, status: int = 0) -> Path:
        calls, tools = tmp_path / "calls", tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        for name in ("squeue", "scontrol"):
            print_answer = f"echo {answer}" if name == "squeue" else f"echo no such job >&2; exit {status}"
            (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" $SLURM_TIME_FORMAT >> {calls}\n{print_answer}\n')
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return calls

    return make


def test_the_end_of_the_job(commands: Any) -> None:
    calls = commands("1700000000")
    assert slurm.end_of_job() == 1.7e9
    assert calls.read_text() == "squeue --noheader --jobs=7 --format=%e %s\n"
    commands("N/A")
    assert slurm.end_of_job() == math.inf


def test_of_an_array_one_task_is_requeued(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = commands("RUNNING 0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.requeue()
    assert calls.read_text().splitlines()[-1] == "scontrol requeue 7_2"


def test_a_cancelled_job_is_not_requeued(commands: Any) -> None:
    calls = commands("COMPLETING 0")
    assert not slurm.requeue()
    assert "scontrol" not in calls.read_text()


def test_what_slurm_has_requeued_itself_is_left_alone(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = commands("COMPLETING 3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert slurm.requeue()
    assert "scontrol" not in calls.read_text()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert not slurm.requeue()


def test_a_requeue_that_fails_is_told(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands("RUNNING 0", status=1)
    with pytest.warns(UserWarning, match="scontrol requeue 7: no such job"):
        assert not slurm.requeue()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="No such file"):
        assert not slurm.requeue()


def test_slurms_own_requeue_is_off_and_torchrun_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.slurm_environments() == []
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert [environment.auto_requeue for environment in slurm.slurm_environments()] == [False]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    assert slurm.slurm_environments() == []
