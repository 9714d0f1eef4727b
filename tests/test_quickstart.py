"""The promise of the README: the quickstart can be killed at any moment, and ends as if it had not been."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 40, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's own corpus."""
    folder = tmp_path_factory.mktemp("quickstart") / "docstrings"
    run("prepare", "pretrain", "--output", str(folder), "--held_out", "0.02")
    return folder


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "cli.py", *arguments], cwd=ROOT, check=True, capture_output=True)


def fit_arguments(data: Path, runs: Path) -> list[str]:
    """The quickstart's fit, only shorter and elsewhere."""
    changed = runs / "shorter.yaml"
    runs.mkdir()
    changed.write_text(
        f"trainer:\n  max_steps: {STEPS}\n  logger: {{init_args: {{save_dir: {runs}}}}}\n"
        f"  callbacks:\n    - class_path: lightning_modules.LastCheckpoint\n"
        f"      init_args: {{every_n_train_steps: {EVERY}}}\n"
        f"model: {{val_every_n_steps: {STEPS // 2}}}\n"
        f"data: {{init_args: {{path: {data}}}}}\n"
    )
    return ["fit", "--config", "configs/quickstart.yaml", "--config", str(changed), "--ckpt_path", "last"]


def last_checkpoint(runs: Path) -> Path:
    return runs / "quickstart" / "rat" / "checkpoints" / "last.ckpt"


def step_of(runs: Path) -> int:
    path = last_checkpoint(runs)
    return torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0


def validation_losses(runs: Path) -> dict[int, float]:
    curves = EventAccumulator(str(runs / "quickstart" / "rat"))
    curves.Reload()
    return {event.step: event.value for event in curves.Scalars("val/loss")}


@pytest.mark.slow
def test_killed_again_and_again_it_ends_at_the_same_loss(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*fit_arguments(data, whole))
    arguments, draw, stops = fit_arguments(data, killed), random.Random(0), []
    for stop in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "cli.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = step_of(killed)
        while process.poll() is None and step_of(killed) == before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 2))
        assert process.poll() is None, "it ended before it could be stopped: make it longer"
        process.send_signal(stop)
        process.wait()
        stops.append(step_of(killed))
    assert 0 < stops[0] < stops[-1] < STEPS
    run(*arguments)
    assert validation_losses(killed)[STEPS - 1] == validation_losses(whole)[STEPS - 1]
    weights = [torch.load(last_checkpoint(runs), weights_only=True)["state_dict"] for runs in (whole, killed)]
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]), name
