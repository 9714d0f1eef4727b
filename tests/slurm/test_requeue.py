"""The job scripts in a real SLURM: preempted with one rank behind, requeued, and at the end the same weights."""

from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rat_cli.sweep_results import read_runs

pytestmark = pytest.mark.slow


# For sbatch: what is here, instead of GPUs.
HERE = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
# The nodes' names are known to Slurm alone.
MEET = {"MASTER_ADDR": "127.0.0.1"}


def options(runs: Any, name: str) -> list[str]:
    return [*HERE, f"--job-name={name}", f"--output={runs.folder}/%x-%j.log"]


def test_two_nodes_are_signalled_and_preempted_and_end_with_the_same_weights(slurm: Any, runs: Any) -> None:
    args = runs.options("requeued")
    job = slurm.submit("multi_node", *args, options=options(runs, "requeued"), env=runs.environment | MEET)
    runs.wait_for_step("requeued", 3)
    slurm("scancel", "--signal=USR1", job)
    slurm.wait_for_restart(job, 1)
    runs.wait_for_step("requeued", 12)
    assert slurm.restarts(job) == 1
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    other = slurm("sbatch", "--parsable", *urgent).strip()
    assert slurm.wait_for_end(other) == {"COMPLETED"}, slurm.logs()
    slurm.wait_for_restart(job, 2)
    runs.hurry("requeued")
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    assert slurm.restarts(job) == 2

    runs.assert_same("requeued")
    for rank in (0, 1):
        seen = runs.trace("requeued", rank)
        assert [row[::2] for row in seen] == [row[::2] for row in runs.trace("whole", rank)], "every sample once"
        assert len({pid for _, pid, _ in seen}) == 3
    output = (runs.folder / f"requeued-{job}.log").read_text()
    assert output.count("saved, requeued") == 2
    assert "(SIGUSR1), saved" in output
    assert "(SIGTERM), saved" in output, "by the other job, which had to wait for it"
    assert "requeued 2 times" in output
    events = EventAccumulator(str(runs.folder / "runs" / "requeued"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(24)), "one log, without holes"
    assert (runs.folder / "runs" / "requeued" / "model" / "model.safetensors").is_file()


def test_a_job_whose_time_runs_out_goes_on_in_the_next_turn(slurm: Any, runs: Any) -> None:
    before_the_end = ["--trainer.callbacks+=lightning_modules.Preemption", "--trainer.callbacks.margin=0.25"]
    job = slurm.submit(
        "single_node", *runs.options("late", delay=2), *before_the_end,
        options=[*options(runs, "late"), "--ntasks-per-node=2", "--time=1", "--signal=CONT@1"],
        env=runs.environment | MEET,
    )  # fmt: skip
    slurm.wait_for_restart(job, 1, seconds=90)
    runs.hurry("late")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # one turn more is enough
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    assert slurm.restarts(job) == 1
    assert "end of the job), saved, requeued" in (runs.folder / f"late-{job}.log").read_text()
    runs.assert_same("late")


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


def test_an_array_trains_the_runs_of_a_sweep(slurm: Any, runs: Any) -> None:
    sweep = {
        "name": "chunks", "fit": [runs.options("chunks", delay=0)[1]], "runs": str(runs.folder / "runs"),
        "variants": {f"L{size}": {"model.model.chunk_size": size} for size in (2, 8)},
        "options": {"trainer.max_steps": 2}, "output": str(runs.folder / "results"),
    }  # fmt: skip
    (runs.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    job = slurm.submit(
        "ablation_array", "--config", str(runs.folder / "sweep.yaml"),
        options=[*options(runs, "chunks"), "--array=0-1"], env=runs.environment,
    )  # fmt: skip
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    for size in (2, 8):
        path = runs.folder / "runs" / "chunks" / f"L{size}-s0" / "checkpoints" / "last.ckpt"
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        assert checkpoint["model_config"]["chunk_size"] == size
        assert checkpoint["global_step"] == 2
    assert list(read_runs(runs.folder / "results").run) == ["L2-s0", "L8-s0"]


def test_a_job_that_loses_a_node_goes_on_with_another(slurm: Any, runs: Any) -> None:
    job = slurm.submit("multi_node", *runs.options("lost"), options=options(runs, "lost"), env=runs.environment | MEET)
    runs.wait_for_step("lost", 6)
    slurm("scontrol", "update", "NodeName=n2", "State=down", "Reason=lost")
    slurm.wait_for_restart(job, 1)
    runs.hurry("lost")
    slurm("scontrol", "update", "NodeName=n2", "State=idle")
    assert slurm.wait_for_end(job) == {"COMPLETED"}, runs.logs()
    assert slurm.restarts(job) == 1
    runs.assert_same("lost")
