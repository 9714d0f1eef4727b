"""The job scripts in a real SLURM: preempted with one rank behind, requeued, and at the end the same weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


# For sbatch: what is here, instead of GPUs.
HERE = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]


def options(runs: Any, name: str) -> list[str]:
    return [*HERE, f"--job-name={name}", f"--output={runs.folder}/%x-%j.log"]


def test_two_nodes_are_preempted_twice_and_end_with_the_same_weights(slurm: Any, runs: Any) -> None:
    environment = runs.environment | {"MASTER_ADDR": "127.0.0.1"}  # the nodes' names are known to Slurm alone
    args = runs.options("requeued")
    job = slurm.submit("multi_node", *args, options=options(runs, "requeued"), env=environment)
    for restart, step in enumerate((3, 12)):
        runs.wait_for_step("requeued", step)
        assert slurm.restarts(job) == restart
        slurm("scancel", "--signal=USR1", job)
        slurm.wait_for_restart(job, restart + 1)
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    assert slurm.restarts(job) == 2

    whole = runs.weights("whole")
    for name, x in runs.weights("requeued").items():
        torch.testing.assert_close(x, whole[name], rtol=0, atol=0, msg=name)
    for rank in (0, 1):
        seen = runs.trace("requeued", rank)
        assert [row[::2] for row in seen] == [row[::2] for row in runs.trace("whole", rank)], "every sample once"
        assert len({pid for _, pid, _ in seen}) == 3
    output = (runs.folder / f"requeued-{job}.log").read_text()
    assert output.count("saved, requeued") == 2
    assert "requeued 2 times" in output
    events = EventAccumulator(str(runs.folder / "runs" / "requeued"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(24)), "one log, without holes"
    assert (runs.folder / "runs" / "requeued" / "model" / "model.safetensors").is_file()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Any, runs: Any) -> None:
    job = slurm.submit(
        "single_node", *runs.options("cancelled"), options=options(runs, "cancelled"), env=runs.environment
    )
    runs.wait_for_step("cancelled", 2)
    slurm("scancel", job)
    assert slurm.wait_for_end(job) == {"CANCELLED"}, runs.logs()
    assert slurm.restarts(job) == 0
    assert "(SIGTERM), saved, not requeued" in (runs.folder / f"cancelled-{job}.log").read_text()
    assert (runs.folder / "runs" / "cancelled" / "checkpoints" / "last.ckpt").is_file()


def test_an_array_trains_one_model_for_each_chunk_size(slurm: Any, runs: Any) -> None:
    job = slurm.submit(
        "ablation_array", *runs.options("chunks"), "--trainer.max_steps", "2",
        options=[*options(runs, "chunks"), "--array=0-1"], env=runs.environment | {"CHUNK_SIZES": "2 8"},
    )  # fmt: skip
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    for size in (2, 8):
        path = runs.folder / "runs" / f"chunks-L{size}" / "checkpoints" / "last.ckpt"
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        assert checkpoint["model_config"]["chunk_size"] == size
        assert checkpoint["global_step"] == 2


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
    out, _ = (again := runs.torchrun("told")).communicate(timeout=120)
    assert again.returncode == 0, out
    whole = runs.weights("whole")
    for name, x in runs.weights("told").items():
        torch.testing.assert_close(x, whole[name], rtol=0, atol=0, msg=name)
