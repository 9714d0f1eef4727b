"""Whole models that continue as many prompts as fit in a given memory: tokens per second, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Measurement, TaskSpec

from rat import ModelConfig
from rat.benchmarks.capacity import PRECISION, largest_batch
from rat.benchmarks.floors import decode_work
from rat.benchmarks.footprint import available_bytes
from rat.benchmarks.options import Dtype, place, positive, precision
from rat.benchmarks.process import KilledError, in_fresh_process
from rat.benchmarks.provenance import machine
from rat.benchmarks.report import Report, color
from rat.benchmarks.serving import Served, Workload, rehearse, serve
from rat.benchmarks.timing import Rates, measure_rates
from rat.ops import Backend
from rat.ops.backend import describe_backend

# Of the budget, for what a long run holds beyond a rehearsal: the fragments of a heap.
HEADROOM = 0.03


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One model at its largest batch. Rates count new tokens only; ratios are against the first model."""

    contender: str
    parameters: int
    state_bytes: int  # of a row at the end
    batch_size: int
    peak_bytes: int  # the highest of all runs: weights, state and activations
    tokens_per_second: float | None = None  # of decoding, at the median time
    iqr_tokens_per_second: float | None = None  # distance of the quartiles
    ratio: float | None = None
    with_prompt_tokens_per_second: float | None = None  # the prompts' time included
    with_prompt_ratio: float | None = None
    floor_seconds: float  # of decoding
    floor_limit: str  # arithmetic or bytes
    times_floor: float | None = None
    prefill_seconds: list[float] = field(default_factory=list)  # of every round
    decode_seconds: list[float] = field(default_factory=list)


def throughput_benchmark(
    patterns: Sequence[str] = ("attention", "rat"),
    memory_gb: float | None = None,
    prompt_length: int = 3072,
    new_tokens: int = 1024,
    d_model: int = 256,
    num_layers: int = 4,
    d_head: int = 64,
    vocab_size: int = 4096,
    chunk_size: int = 16,
    num_groups: int = 2,
    window_size: int = 1024,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    repeats: int = 3,
    device: str = "cpu",
    output: Path | None = None,
) -> list[Throughput]:
    """Find each model's largest batch within a memory budget, then prefill and decode with it; the models take turns.

    A batch fits where a run has been seen to stay within the budget: the first guess is counted from the weights and
    the decoding state, then runs are measured and the guess corrected. On a CPU the memory is what the system has
    really given to a fresh process since before the model was made, on a GPU what its allocator has held. Prompts go
    in a few rows at a time, so that decoding states fill the memory. Weights and prompts are random.

    Args:
        patterns: the models to compare, each a mixer or several joined by + that take turns by layer, such as
            rat+sliding_window; the first is the yardstick.
        memory_gb: the budget in GB (10^9 bytes); default on a GPU: what is free on it.
        prompt_length: tokens of every prompt.
        new_tokens: tokens generated for each, greedily; fewer make a quicker run.
        d_model: D.
        num_layers: blocks.
        d_head: d.
        vocab_size: V.
        chunk_size: L of RAT.
        num_groups: G of RAT.
        window_size: W of sliding windows.
        dtype: of weights and decoding states.
        backend: which implementation of `rat.ops` runs.
        repeats: rounds of whole runs, whose median is taken.
        device: cpu, cuda or cuda:N.
        output: folder of the results; default: runs/bench/throughput/ and the time.

    Returns:
        A row for each model.

    Raises:
        ValueError: an unknown name, a number below 1, sizes that do not fit each other, no budget or one that is
            larger than the memory or too small for one row, no such device, a backend that cannot run.
    """
    options = dict(locals())
    where, kind = place(device), precision(dtype)
    positive(prompt_length=prompt_length, repeats=repeats)
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, got {new_tokens}: the first comes from the prompt")
    if d_head < 1 or d_model % d_head:
        raise ValueError(f"d_model {d_model} is not divisible by d_head {d_head}")
    configs = _configs(
        patterns, vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=d_model // d_head,
        chunk_size=chunk_size, num_groups=num_groups, window_size=window_size,
        max_seq_len=prompt_length + new_tokens,
    )  # fmt: skip
    budget = _budget(memory_gb, where)
    explained = describe_backend(backend, where, training=False)
    with Report("throughput", output, options | {"budget_bytes": budget}, where) as report:
        rates = measure_rates(kind, where)
        report.rates(rates)
        if where.type == "cuda":
            torch.cuda.empty_cache()  # the budget is for the processes of the runs
        report.picture(lambda figure: _draw(figure, [run.row(runs) for run in runs]), (2.0 + 1.6 * len(patterns), 4.2))
        print(f"{machine(where)}; {explained}", flush=True)
        print(f"{rates}; {dtype}, D {d_model}, {num_layers} layers, V {vocab_size}, L {chunk_size}, W {window_size}")
        print(f"{prompt_length} tokens of prompt, {new_tokens} new ones, in {budget / 1e9:.3f} GB", flush=True)
        runs: list[_Run] = []
        for name, config in configs.items():
            workload = Workload(
                config=config, prompt_length=prompt_length, new_tokens=new_tokens, dtype=kind, backend=backend,
                device=device,
            )  # fmt: skip
            runs.append(_Run(name, workload, budget, rates))
        for round_ in range(1, repeats + 1):
            for run in runs:
                print(f"round {round_} of {repeats}: {run.name}, batch {run.batch_size}", flush=True)
                run.serve(round_)
                report.put("rows", [other.row(runs) for other in runs])
        table = [run.row(runs) for run in runs]
        print("\n".join(_lines(table)), flush=True)
    return table


def _configs(patterns: Sequence[str], **sizes: Any) -> dict[str, ModelConfig]:
    if not patterns or len(set(patterns)) < len(patterns):
        raise ValueError(f"name at least one pattern, and each of them once; got {list(patterns)}")
    return {name: ModelConfig(pattern=name.split("+"), **sizes) for name in patterns}  # type: ignore[arg-type]


def _budget(memory_gb: float | None, device: torch.device) -> int:
    """The budget in bytes, which has to be there."""
    if memory_gb is None:
        if device.type == "cpu":
            raise ValueError("give --memory_gb: on a CPU nobody else knows how much memory the models may take")
        return in_fresh_process(available_bytes, device)  # whose own context is counted already
    if not memory_gb > 0:
        raise ValueError(f"memory_gb must be above 0, got {memory_gb}")
    free = available_bytes(device)
    if memory_gb * 1e9 > free:
        raise ValueError(f"memory_gb is {memory_gb}, but only {free / 1e9:.1f} GB are free")
    return int(memory_gb * 1e9)


class _Run:
    """A model, the batch that it has room for, and what it has been measured to do."""

    def __init__(self, name: str, workload: Workload, budget: int, rates: Rates) -> None:
        self.name, self.workload, self._budget, self._rates = name, workload, budget, rates
        self._model = workload.empty_model()
        aim = int((1 - HEADROOM) * budget)
        self.batch_size, self._rehearsed = largest_batch(self._peak_of, aim, workload.row_bytes())
        self._served: list[Served] = []

    def _peak_of(self, batch_size: int) -> int | None:
        peak = _attempt(rehearse, self.workload, batch_size)
        found = "runs out of memory" if peak is None else f"takes {peak / 1e9:.3f} GB"
        print(f"{self.name}: a batch of {batch_size} {found}", flush=True)
        return peak

    def serve(self, rounds: int) -> None:
        """Run until there are so many; should one not stay within the budget, all again with a smaller batch."""
        while len(self._served) < rounds:
            served = _attempt(serve, self.workload, self.batch_size)
            if served is not None and served.peak_bytes <= self._budget:
                self._served.append(served)
                continue
            if self.batch_size == 1:
                raise ValueError(f"{self.name}: one row does not stay within the budget: raise --memory_gb")
            excess = 0 if served is None else int(self.batch_size * (1 - self._budget / served.peak_bytes))
            self.batch_size -= min(self.batch_size - 1, max(excess, 1 + int(PRECISION * self.batch_size)))
            print(f"{self.name}: not within the budget, once more with a batch of {self.batch_size}", flush=True)
            self._served.clear()

    def row(self, all_runs: Sequence["_Run"]) -> Throughput:
        """What is known so far."""
        middle = self.workload.prompt_length + self.workload.new_tokens // 2
        floor = decode_work(self._model, self.batch_size, middle).floor(self._rates)
        steps = self.workload.new_tokens - 1
        common: Any = {"contender": self.name, "parameters": self._model.num_parameters()}
        common |= {"state_bytes": self.workload.state_bytes(), "batch_size": self.batch_size}
        common |= {"floor_seconds": steps * floor.seconds, "floor_limit": floor.limit}
        if not self._served:
            return Throughput(**common, peak_bytes=self._rehearsed)
        decoding, whole = self.tokens_per_second()
        first_decoding, first_whole = all_runs[0].tokens_per_second()
        return Throughput(
            **common,
            peak_bytes=max(served.peak_bytes for served in self._served),
            tokens_per_second=decoding.median,
            iqr_tokens_per_second=decoding.iqr,
            ratio=decoding.median / first_decoding.median,
            with_prompt_tokens_per_second=whole.median,
            with_prompt_ratio=whole.median / first_whole.median,
            times_floor=self.batch_size / decoding.median / floor.seconds,
            prefill_seconds=[served.prefill_seconds for served in self._served],
            decode_seconds=[served.decode_seconds for served in self._served],
        )

    def tokens_per_second(self) -> tuple[Measurement, Measurement]:
        """New tokens a second of every run, while decoding and over all."""
        new = self.workload.new_tokens
        decoding = [self.batch_size * (new - 1) / served.decode_seconds for served in self._served]
        whole = [self.batch_size * new / (served.prefill_seconds + served.decode_seconds) for served in self._served]
        return Measurement(1, decoding, TaskSpec(self.name, "")), Measurement(1, whole, TaskSpec(self.name, ""))


def _attempt(function: Callable[..., Any], workload: Workload, batch_size: int) -> Any:
    """`function` in a fresh process; None also where the system has ended it, as it does when memory runs out."""
    try:
        return in_fresh_process(function, workload, batch_size)
    except KilledError:
        return None


def _lines(table: Sequence[Throughput]) -> list[str]:
    columns = f"{'batch':>7}{'peak GB':>9}{'KB/row':>10}{'tokens/s':>11}{'IQR':>9}{'ratio':>8}{'x floor':>9}"
    lines = [f"\n{'':<24}{columns}  {'set by':<11}{'with prompt':>12}{'ratio':>8}"]
    for row in table:
        lines.append(
            f"{row.contender:<24}{row.batch_size:>7}{row.peak_bytes / 1e9:>9.3f}{row.state_bytes / 1e3:>10.1f}"
            f"{row.tokens_per_second:>11.1f}{row.iqr_tokens_per_second:>9.1f}{row.ratio:>7.2f}x"
            f"{row.times_floor:>9.2f}  {row.floor_limit:<11}"
            f"{row.with_prompt_tokens_per_second:>12.1f}{row.with_prompt_ratio:>7.2f}x"
        )
    return lines


def _draw(figure: Any, table: Sequence[Throughput]) -> None:
    """A bar for each model: new tokens a second while decoding, and with the prompts' time."""
    ax = figure.add_subplot()
    done = [row for row in table if row.tokens_per_second is not None]
    for place_, row in enumerate(done):
        ax.bar(place_ - 0.2, row.tokens_per_second, 0.4, color=color(row.contender))
        ax.bar(place_ + 0.2, row.with_prompt_tokens_per_second, 0.4, color=color(row.contender), alpha=0.4)
        label = f"{row.ratio:.1f}x, batch {row.batch_size}"
        ax.annotate(label, (place_, row.tokens_per_second), ha="center", va="bottom")
    ax.set_xticks(range(len(done)), [row.contender for row in done])
    ax.set(ylabel="new tokens/s (pale: prompts included)", title="at the largest batch that fits")
    ax.margins(y=0.12)
