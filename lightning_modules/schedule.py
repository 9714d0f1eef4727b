"""AdamW and the learning rate of the paper (arXiv 2507.04416), and how a global batch is accumulated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are the paper's pre-training.

    Attributes:
        peak_lr: learning rate at the end of the warm-up.
        betas: decay of AdamW's two running means.
        weight_decay: decoupled, on all parameters, norms and biases included.
        eta_min: learning rate that the cosine approaches.
        warmup_fraction: share of all steps in which the learning rate rises.
    """

    peak_lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    eta_min: float = 1e-6
    warmup_fraction: float = 0.05

    def __post_init__(self) -> None:
        """Raise one ValueError that names the first field that does not fit."""
        if not self.peak_lr > 0:
            raise ValueError(f"peak_lr must be above 0, got {self.peak_lr}")
        if not 0 <= self.eta_min <= self.peak_lr:
            raise ValueError(f"eta_min must lie between 0 and peak_lr {self.peak_lr}, got {self.eta_min}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {self.warmup_fraction}")


PAPER = OptimizerConfig()


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step n = `step` (from 0) of N = `total_steps`.

    With w = int(warmup_fraction * N): peak (n + 1) / w while n < w, then
    eta_min + (peak - eta_min) (1 + cos(pi (n - w) / (N - w))) / 2.
    """
    warmup = int(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    progress = (step - warmup) / (total_steps - warmup)
    return config.eta_min + (config.peak_lr - config.eta_min) * (1 + math.cos(math.pi * progress)) / 2


def adamw(parameters: Iterable[nn.Parameter], total_steps: int, config: OptimizerConfig) -> tuple[AdamW, LambdaLR]:
    """The optimiser, and the schedule to be advanced after each of its `total_steps` steps.

    Raises:
        ValueError: no step to make.
    """
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least 1 optimiser step, got {total_steps}: set trainer.max_steps")
    # A base rate of 1 makes LambdaLR's product the rate itself, to the last bit.
    optimizer = AdamW(parameters, lr=1.0, betas=config.betas, weight_decay=config.weight_decay)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate(step, total_steps, config))


def accumulation(global_batch_size: int, batch_size: int, world_size: int) -> int:
    """Micro batches that each device accumulates before an optimiser step.

    Args:
        global_batch_size: sequences of an optimiser step.
        batch_size: sequences that a device takes at once.
        world_size: devices with data of their own.

    Raises:
        ValueError: global_batch_size is no multiple of batch_size * world_size.
    """
    together = batch_size * world_size
    if global_batch_size >= together and global_batch_size % together == 0:
        return global_batch_size // together
    below = global_batch_size // together * together
    legal = " or ".join(str(size) for size in (below, below + together) if size)
    raise ValueError(
        f"global_batch_size {global_batch_size} is no multiple of batch_size {batch_size} x {world_size} devices"
        f" = {together}: choose global_batch_size {legal}, or another batch_size"
    )
