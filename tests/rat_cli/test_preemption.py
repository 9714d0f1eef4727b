"""What the command line adds to a Trainer so that it survives signals and SLURM."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from lightning_modules import Preemption
from lightning_modules.preemption import SIGNALS
from rat_cli.lightning import RatCLI

Cli = Callable[..., Any]
WITHOUT = ["--trainer.callbacks", "null", "--trainer.enable_checkpointing", "false"]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Those that the command line makes."""
    made: list[Trainer] = []
    make = RatCLI._instantiate_trainer

    def keep(self: RatCLI, *args: Any) -> Trainer:
        made.append(make(self, *args))
        return made[-1]

    monkeypatch.setattr(RatCLI, "_instantiate_trainer", keep)
    return made


def margins(trainer: Trainer) -> list[float]:
    return [callback.margin for callback in trainer.callbacks if isinstance(callback, Preemption)]


def test_fit_survives_signals_where_it_saves(cli: Cli, tiny: Path, write: Any, trainers: list[Trainer]) -> None:
    assert cli("fit", "--config", tiny).code == 0
    assert margins(trainers[-1]) == [3]
    own = """
    trainer:
      callbacks: [{class_path: lightning_modules.LastCheckpoint},
                  {class_path: lightning_modules.Preemption, init_args: {margin: 8}}]
    """
    assert cli("fit", "--config", tiny, "--config", write(own)).code == 0
    assert margins(trainers[-1]) == [8]
    assert cli("validate", "--config", tiny).code == 0
    assert margins(trainers[-1]) == []


def test_where_nothing_saves_signals_are_not_held_back(cli: Cli, tiny: Path, trainers: list[Trainer]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        assert cli("fit", "--config", tiny, *WITHOUT).code == 0
        assert margins(trainers[-1]) == []
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def test_under_slurm_lightnings_own_requeue_is_off(
    cli: Cli, tiny: Path, trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert cli("fit", "--config", tiny).code == 0
    environment = trainers[-1]._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_a_run_that_is_told_to_stop_ends_with_its_own_status(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = Preemption.on_train_start

    def told(self: Preemption, *args: Any) -> None:
        train(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    handled = (*SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in handled]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Preemption, "on_train_start", told)
            assert cli("fit", "--config", tiny).code == 75
        assert "stopped after step 1 (SIGTERM), saved" in caplog.text
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
    assert cli("fit", "--config", tiny, "--ckpt_path", "last").code == 0
