"""What a training process asks of the SLURM job that it runs in."""

import math
import os
import subprocess

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_warn


def slurm_environments() -> list[SLURMEnvironment]:
    """The plugin for processes that `srun` has started, else none.

    Lightning would choose it as well, with a requeue of its own that saves in the middle of a step: that deadlocks
    where one rank is behind the others.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def job_id() -> str | None:
    """This job as Slurm's commands want it: of an array one task, whose number alone may stand for all; else None."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def end_of_job() -> float:
    """When Slurm will end this job, in seconds since 1970; infinity if never, or if Slurm does not say."""
    end = _ask("squeue", "--noheader", f"--jobs={job_id()}", "--format=%e", SLURM_TIME_FORMAT="%s")
    return float(end) if end is not None and end.isdecimal() else math.inf


def requeue() -> bool:
    """Ask Slurm to end this job and start it anew; whether it will.

    It has done so already where another job takes the place of this one. A job that was cancelled stays so.
    """
    job = str(job_id())
    state, restarts = (_ask("squeue", "--noheader", f"--jobs={job}", "--Format=State,RestartCnt") or "NONE 0").split()
    if int(restarts) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return True
    return state == "RUNNING" and _ask("scontrol", "requeue", job) is not None


def _ask(*command: str, **environment: str) -> str | None:
    """What `command` prints; None, after a warning that says why, if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        rank_zero_warn(f"{' '.join(command)}: {str(reason).strip()}")
        return None
    return done.stdout.strip()
