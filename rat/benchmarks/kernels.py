"""The Triton kernels: compiled for GPUs that are not here, or checked and timed on one that is."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from rat.benchmarks import kernel_races
from rat.benchmarks.ahead_of_time import CHIPS, Compiled, arch, capability_of, check_compiler, compile_launches
from rat.benchmarks.kernel_cases import CASES, EVERY_WIDTH, SHIPPED, Shape
from rat.benchmarks.kernel_tables import (
    KernelRow,
    TrafficRow,
    kernel_lines,
    summary_lines,
    traffic_lines,
)
from rat.benchmarks.options import one_of, place, positive
from rat.benchmarks.provenance import machine
from rat.benchmarks.report import Report
from rat.benchmarks.traffic import Pass, record
from rat.markdown import header, line, write_block
from rat.ops.backend import INTERPRETED, describe_backend
from rat.ops.launch import Capability, Cost
from rat.ops.spans import TILE, tiles

Configs = Mapping[str, tuple[Shape, tuple[torch.dtype, ...]]]


def kernels_benchmark(
    compile_only: bool = False,
    archs: Sequence[int] = (80, 90, 100),
    every_width: bool = False,
    configs: Sequence[str] = tuple(SHIPPED),
    tokens: int = 32768,
    repeats: int = 5,
    device: str = "cuda",
    page: Path | None = None,
    output: Path | None = None,
) -> None:
    """Check the Triton kernels: on a GPU, or, with --compile-only, by compiling them for GPUs that are not here.

    On a GPU every operation is compared with the reference in fp64, forward and backward, in every dtype, and timed
    beside the versions on plain PyTorch and on FlexAttention. With --compile-only no GPU is needed: what a layer of
    each config would launch is compiled, and the tables tell registers, spills, shared memory, an estimate of the
    occupancy, and bytes and FLOPs by count against the least that the operation needs.

    Args:
        compile_only: compile instead of running.
        archs: compute capabilities to compile for: 80 (A100), 90 (H100), 100 (B200).
        every_width: compile for every head width from 16 to 256 in bf16, fp16 and fp32 as well, which takes long.
        configs: sizes of layers: xl, quickstart, synthetic.
        tokens: of a batch that is timed.
        repeats: rounds whose median is taken, after one that warms up.
        device: that is checked and timed: cuda, cuda:N, or, with TRITON_INTERPRET=1, cpu, to see how it goes.
        page: a Markdown page that takes the tables, between markers of their names.
        output: folder of the results as JSON; default: runs/bench/kernels/ and the time.

    Raises:
        FileNotFoundError: there is no such page.
        ValueError: an unknown name, no such device, interpreted kernels where real ones are wanted; and, after all
            is told, kernels that spill or do not fit a GPU, or results that are not as exact as PyTorch's.
    """
    options = dict(locals())
    one_of("config", configs, list(SHIPPED))
    positive(repeats=repeats, tokens=tokens)
    if page is not None and not page.is_file():
        raise FileNotFoundError(f"there is no page {page} to write tables to")
    chosen = {name: SHIPPED[name] for name in configs}
    if compile_only:
        capabilities = [capability_of(number) for number in archs]
        one_of("arch", [str(number) for number in archs], [str(10 * major + minor) for major, minor in CHIPS])
        check_compiler()
        with Report("kernels", output, options, torch.device("cpu")) as report:
            faults = _compile_all(chosen, EVERY_WIDTH if every_width else {}, capabilities, report, page)
        if faults:
            raise ValueError("kernels that do not fit: " + "; ".join(faults))
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: bench kernels needs one, or --compile-only")
    where = place(device)
    if INTERPRETED and where.type == "cuda":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels, on a GPU too: unset it to time real ones")
    describe_backend("triton", where, training=True)
    with Report("kernels", output, options, where) as report:
        print(machine(where))
        wrong = kernel_races.check_and_time(chosen, tokens, repeats, where, report, page)
    if wrong:
        raise ValueError("results that are less exact than they may be: " + "; ".join(wrong))


class _Counted(NamedTuple):
    """A pass of an operation, with what names it."""

    config: str
    dtype: str
    case: str
    counted: Pass


def _compile_all(
    shipped: Configs, others: Configs, capabilities: Sequence[Capability], report: Report, page: Path | None
) -> list[str]:
    """Compile everything, print the tables and put them on the page; what does not fit its GPU, in words."""
    kernels, traffic = compiled_rows(shipped, capabilities)
    report.put("rows", kernels)
    report.put("traffic", traffic)
    blocks = {"window": list(window_lines(shipped)), "kernels": list(_by_config(shipped, kernels, traffic))}
    every, _ = compiled_rows(others, capabilities) if others else ([], [])
    if every:
        report.put("every_width", every)
        blocks["every width"] = list(summary_lines(every))
    for name, lines in blocks.items():
        print("\n".join(["", *lines]), flush=True)
        if page is not None:
            write_block(page, name, lines)
    names = (
        f"{row.kernel} of {row.case} ({row.config}, {row.dtype}): {f}" for row in kernels + every for f in row.faults
    )
    return list(names)


def compiled_rows(configs: Configs, capabilities: Sequence[Capability]) -> tuple[list[KernelRow], list[TrafficRow]]:
    """Every kernel that the configs launch, compiled for each GPU, and what each pass moves and computes."""
    built: dict[Capability, list[tuple[_Counted, list[Compiled]]]] = {}
    for capability in capabilities:
        passes = list(_passes(configs, capability))
        launches = [launch for entry in passes for launch in entry.counted.launches]
        with tqdm(desc=arch(capability), total=len(launches), leave=False, disable=None, delay=1) as bar:
            compiled = iter(compile_launches(launches, capability, bar.update))
        built[capability] = [(entry, [next(compiled) for _ in entry.counted.launches]) for entry in passes]
    kernels: list[KernelRow] = []
    traffic: list[TrafficRow] = []
    for entries in zip(*built.values(), strict=True):
        first = entries[0][0]
        traffic.append(_traffic_row(first))
        kernels += _kernel_rows(first, dict(zip(built, entries, strict=True)))
    return kernels, traffic


def _passes(configs: Configs, capability: Capability) -> Iterator[_Counted]:
    for config, (shape, dtypes) in configs.items():
        for dtype in dtypes:
            for name, case in CASES.items():
                if "triton" in case.versions():
                    for counted in record(case, shape, dtype, capability):
                        yield _Counted(config, str(dtype).removeprefix("torch."), name, counted)


def _traffic_row(entry: _Counted) -> TrafficRow:
    counted = entry.counted
    return TrafficRow(
        config=entry.config,
        dtype=entry.dtype,
        case=entry.case,
        direction=counted.direction,
        launches=len(counted.launches),
        bytes_moved=counted.bytes_moved,
        bytes_beside=counted.bytes_beside,
        bytes_minimum=counted.bytes_minimum,
        flops=counted.flops,
        flops_minimum=counted.flops_minimum,
    )


def _kernel_rows(first: _Counted, entries: Mapping[Capability, tuple[_Counted, list[Compiled]]]) -> Iterator[KernelRow]:
    """A row for each kernel of a pass: the launches of all GPUs are the same ones, in the same order."""
    for place_, launch in enumerate(first.counted.launches):
        compiled = {capability: found[place_] for capability, (_, found) in entries.items()}
        yield KernelRow(
            config=first.config,
            dtype=first.dtype,
            case=first.case,
            direction=first.counted.direction,
            kernel=launch.kernel.__name__,
            compiled={arch(capability): found for capability, found in compiled.items()},
            resident_warps={arch(c): found.resident_warps(CHIPS[c]) for c, found in compiled.items()},
            faults=[f"{arch(c)}: {fault}" for c, found in compiled.items() for fault in found.faults(CHIPS[c])],
            cost=Cost(*launch.cost),
        )


def _by_config(configs: Configs, kernels: Sequence[KernelRow], traffic: Sequence[TrafficRow]) -> Iterator[str]:
    """The two tables of each config and dtype."""
    for config, (shape, dtypes) in configs.items():
        for dtype in (str(kind).removeprefix("torch.") for kind in dtypes):
            yield f"#### {config}, {dtype}: {shape}"
            yield ""
            yield from kernel_lines([row for row in kernels if (row.config, row.dtype) == (config, dtype)])
            yield ""
            yield from traffic_lines([row for row in traffic if (row.config, row.dtype) == (config, dtype)])
            yield ""


def window_lines(configs: Configs) -> Iterator[str]:
    """Pairs of a query and a key: those that a window needs, and those that each way of computing it visits."""
    yield from header("config", "T", "W", "pairs of a head", "FlexAttention", "portable", "causal flash kernel")
    for config, (shape, _) in configs.items():
        for length in dict.fromkeys((shape.seq_len, 8 * shape.seq_len)):
            visited = window_pairs(length, shape.window_size)
            shares = (f"{visited[name] / visited['needed']:.2f}x" for name in ("flex", "portable", "flash"))
            yield line(config, length, shape.window_size, f"{visited['needed']:,}", *shares)


def window_pairs(length: int, window_size: int) -> dict[str, int]:
    """Pairs that causal attention inside a window needs and visits, by the tile of each kernel."""
    from rat.ops.sliding_window.portable import FEWEST_ROWS

    tokens = torch.arange(length)[None]
    partial_tiles, _, full_tiles, *_ = tiles((tokens - window_size).clamp(min=0), tokens + 1, length)
    rows = min(length - window_size, max(FEWEST_ROWS, window_size // 2))
    blocks = -(-(length - window_size) // rows)
    across = -(-length // TILE)
    return {
        "needed": int((tokens.clamp(max=window_size) + 1).sum()),
        "flex": int(partial_tiles.sum() + full_tiles.sum()) * TILE**2,
        "portable": window_size * (window_size + 1) // 2 + blocks * rows * (rows + window_size),
        "flash": across * (across + 1) // 2 * TILE**2,
    }
