"""Fair timings on a noisy machine: candidates take turns, and medians of whole rounds are compared.

The statistics are those of `torch.utils.benchmark.Measurement`. Its `Timer` measures one statement after the other,
so that a machine that slows down half-way looks like a slow statement; hence the rounds.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch.utils.benchmark import Measurement, TaskSpec
from tqdm import tqdm

Name = TypeVar("Name", bound=str)

# A turn that would be shorter repeats its work, so that neither the clock nor starting a kernel decides.
SHORTEST_TURN = 0.01
MOST_RUNS = 1000
# A first run that took longer is not made again to learn how long it takes once everything is compiled and loaded.
PATIENCE = 10.0


class Rates(NamedTuple):
    """What the machine can do at best, as measured in the same run as everything beside it."""

    flops_per_second: float  # of a square matrix product in the dtype asked for
    bytes_per_second: float  # of a copy that fits in no cache, read and written bytes together
    # of the product in fp32, on a CPU, whose kernels may compute narrower dtypes in it; 0 where none of them does
    fp32_flops_per_second: float = 0.0

    @property
    def arithmetic(self) -> float:
        """FLOP/s that no kernel is above."""
        return max(self.flops_per_second, self.fp32_flops_per_second)

    def __str__(self) -> str:
        computing, moving = self.flops_per_second / 1e9, self.bytes_per_second / 1e9
        at_best = f" (in fp32 at {self.arithmetic / 1e9:.0f})" * (self.arithmetic > self.flops_per_second)
        return f"matrix products at {computing:.0f} GFLOP/s{at_best}, copies at {moving:.1f} GB/s"


def interleaved(
    candidates: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device, label: str = ""
) -> dict[Name, Measurement]:
    """Seconds of each candidate once it is warm; all take one turn a round, so that drift hits them alike.

    Args:
        candidates: what to run, by name.
        repeats: rounds that count.
        device: waited for at both ends of a turn.
        label: names the work beside the progress bar, which only terminals see.

    Returns:
        `median`, `iqr` (the distance of the quartiles) and `times` of every candidate, per run.
    """
    turns: dict[Name, list[float]] = {name: [] for name in candidates}
    total = (repeats + 1) * len(candidates)
    with tqdm(desc=label, total=total, leave=False, disable=None, delay=1) as bar:
        runs = {}
        for name, run in candidates.items():
            runs[name] = _runs_of_a_turn(run, device)
            bar.update()
        for _ in range(repeats):
            for name, run in candidates.items():
                turns[name].append(_seconds(run, runs[name], device))
                bar.update()
    return {name: Measurement(runs[name], seconds, TaskSpec(name, "")) for name, seconds in turns.items()}


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The machine's rates of computing and of moving, to compare everything else with."""
    narrow = device.type == "cpu" and dtype.itemsize < torch.float32.itemsize
    return Rates(gemm_rate(dtype, device), copy_rate(device), gemm_rate(torch.float32, device) if narrow else 0.0)


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, of 2048 rows on a CPU and of 8192 elsewhere.

    Where the device is slow at that dtype, such as a CPU at fp16, of fewer rows: no product takes much above a second.
    """
    most = size or (2048 if device.type == "cpu" else 8192)
    rows = min(256, most)
    product = _product(rows, dtype, device)
    while rows < most and min(_seconds(product, 1, device) for _ in range(2)) < 1 / 8:  # twice the rows take 8 times it
        rows = min(2 * rows, most)
        product = _product(rows, dtype, device)
    return 2 * rows**3 / interleaved({"gemm": product}, 5, device)["gemm"].median


def _product(rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    # of its own, since whoever measures before weights are drawn would change them, by the number of products
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, rows, device=device, generator=generator).to(dtype) for _ in range(2))
    return lambda: a @ b


def copy_rate(device: torch.device, num_bytes: int = 1 << 28) -> float:
    """Bytes per second of a copy, what is read and what is written counted both."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"].median


def _runs_of_a_turn(run: Callable[[], object], device: torch.device) -> int:
    """Warm up, and see how often the work fits in the shortest turn."""
    seconds = _seconds(run, 1, device)
    if seconds < PATIENCE:
        seconds = _seconds(run, 1, device)
    return max(1, min(MOST_RUNS, math.ceil(SHORTEST_TURN / max(seconds, 1e-9))))


def _seconds(run: Callable[[], object], count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
