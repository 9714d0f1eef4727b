"""The same signals where no SLURM is: by hand, from torchrun, at a terminal."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def test_a_signal_while_python_still_imports_costs_nothing(runs: Any) -> None:
    command = [sys.executable, "cli.py", "fit", *runs.options("early"), "--trainer.logger.init_args.version", "early"]
    process = subprocess.Popen(command, cwd=runs.root, env=runs.environment)
    status = Path(f"/proc/{process.pid}/status")

    def blocked() -> bool:
        (mask,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigBlk"))
        return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)

    runs.wait_for(blocked, 20)
    process.terminate()
    assert process.wait(60) == 75
    saved = torch.load(runs.folder / "runs" / "early" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


def test_torchrun_stops_both_ranks_when_one_is_told_to(runs: Any) -> None:
    process = runs.torchrun("told")
    try:
        runs.wait_for_step("told", 3)
        os.kill(runs.trace("told", 1)[-1][1], signal.SIGUSR1)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "exitcode  : 75" in out
    (last,) = {runs.trace("told", rank)[-1][0] for rank in (0, 1)}
    assert f"stopped after step {last} (" in out
    runs.hurry("told")
    out, _ = (again := runs.torchrun("told")).communicate(timeout=120)
    assert again.returncode == 0, out
    runs.assert_same("told")


def test_ctrl_c_stops_and_saves_what_lightning_has_started_too(runs: Any) -> None:
    two = ["--trainer.devices=2", "--trainer.logger.init_args.version=typed", "--ckpt_path=last"]
    command = [sys.executable, "cli.py", "fit", *runs.options("typed"), *two]
    # Lightning looks every 5 s whether one of its processes has ended, to kill all of them
    late = "--trainer.callbacks+=trace.Late"
    process = subprocess.Popen([*command, late], cwd=runs.root, env=runs.environment, start_new_session=True)
    runs.wait_for_step("typed", 3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    (last,) = {runs.trace("typed", rank)[-1][0] for rank in (0, 1)}
    assert last < 24
    runs.hurry("typed")
    subprocess.run(command, cwd=runs.root, env=runs.environment, check=True)
    runs.assert_same("typed")
