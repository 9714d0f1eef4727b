"""The learning rate, to the last bit, and the arithmetic of the global batch."""

import math

import pytest
import torch

from lightning_modules.schedule import PAPER, OptimizerConfig, accumulation, adamw, learning_rate


def cosine(progress: float) -> float:
    return 1e-6 + (8e-4 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2


# by hand: w = int(0.05 N) is 0 up to N = 19, 1 up to 39, 2 at 40
TABLE = {
    1: [8e-4],
    2: [8e-4, cosine(1 / 2)],
    4: [8e-4, cosine(1 / 4), cosine(2 / 4), cosine(3 / 4)],
    19: [cosine(n / 19) for n in range(19)],
    20: [8e-4] + [cosine(n / 19) for n in range(19)],
    40: [4e-4, 8e-4] + [cosine(n / 38) for n in range(38)],
}


@pytest.mark.parametrize("total", TABLE)
def test_learning_rate_of_every_step(total: int) -> None:
    assert [learning_rate(n, total, PAPER) for n in range(total)] == TABLE[total]


@pytest.mark.parametrize("total", TABLE)
def test_the_optimizer_steps_with_exactly_these(total: int) -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer, schedule = adamw([weight], total, PAPER)
    used = []
    for _ in range(total):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == TABLE[total]


def test_all_parameters_decay() -> None:
    model = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(2), "linear": torch.nn.Linear(2, 2)})
    optimizer, _ = adamw(model.parameters(), 10, PAPER)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.95)
    assert len(group["params"]) == 3


def test_a_schedule_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 optimiser step, got 0"):
        adamw([], 0, PAPER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_lr", 0.0), ("peak_lr", math.nan), ("eta_min", 1.0), ("eta_min", -1.0), ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1), ("warmup_fraction", 1.0), ("warmup_fraction", -0.1),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize(("whole", "micro", "devices", "steps"), [(512, 4, 1, 128), (512, 4, 16, 8), (8, 8, 1, 1)])
def test_accumulation(whole: int, micro: int, devices: int, steps: int) -> None:
    assert accumulation(whole, micro, devices) == steps


@pytest.mark.parametrize(("whole", "legal"), [(500, "480 or 512"), (31, "32"), (33, "32 or 64")])
def test_an_indivisible_global_batch_names_the_nearest(whole: int, legal: str) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size {whole} .*batch_size 4 x 8 devices.*: choose .* {legal},"):
        accumulation(whole, 4, 8)
