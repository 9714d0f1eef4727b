"""What is known of a run from its Trainer: its folder, the machines it runs on, the samples it sees."""

import os
import resource
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from rat.benchmarks.provenance import machine_facts


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run. All ranks have to ask together."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def reached_end(trainer: Trainer) -> bool:
    """Whether training has made all the steps or epochs that it was to make."""
    steps, epochs = trainer.max_steps, trainer.max_epochs or -1
    return 0 <= steps <= trainer.global_step or 0 < epochs <= trainer.current_epoch


def sample_numbers(trainer: Trainer, batch_idx: int) -> list[int]:
    """The training samples in this rank's micro batch `batch_idx` of the epoch; none if the sampler cannot tell."""
    micro_batch = getattr(getattr(trainer.train_dataloader, "sampler", None), "micro_batch", None)
    return [] if micro_batch is None else micro_batch(batch_idx)


def environment(trainer: Trainer) -> dict[str, Any]:
    """What this start of the run runs on, as plain values."""
    device = trainer.strategy.root_device
    return {
        **machine_facts(device),
        **{name: version(name) for name in ("lightning", "triton") if _installed(name)},
        "host": socket.gethostname(),
        "nodes": trainer.num_nodes,
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "command": sys.argv,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had allocated at most: on the GPU, or else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
