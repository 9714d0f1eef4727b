"""The tables of `bench kernels`, as Markdown that a terminal shows as well."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rat.benchmarks.ahead_of_time import CHIPS, Compiled, arch
from rat.markdown import header, line
from rat.ops.launch import Cost


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """A kernel that an operation launches, as it is compiled for one GPU after the other."""

    config: str
    dtype: str
    case: str
    direction: str
    kernel: str
    compiled: dict[str, Compiled]  # by sm_80, ...
    resident_warps: dict[str, int]
    faults: list[str]
    cost: Cost  # of all launches of it in this pass, on the first of the GPUs


@dataclass(frozen=True, kw_only=True)
class TrafficRow:
    """What a pass of an operation moves and computes, by count, on the first of the GPUs."""

    config: str
    dtype: str
    case: str
    direction: str
    launches: int
    bytes_moved: int
    bytes_beside: int
    bytes_minimum: int
    flops: int
    flops_minimum: int | None


def kernel_lines(rows: Sequence[KernelRow]) -> Iterator[str]:
    """One line a kernel; where GPUs differ, a number for each."""
    names = list(rows[0].compiled)
    yield f"Of {', '.join(f'{name} ({_chip(name)})' for name in names)}, in this order where they differ."
    yield ""
    yield from header(
        "operation", "pass", "kernel", "warps", "registers", "spilled", "shared KB", "warps/SM", "tensor cores"
    )
    for row in rows:
        found = [row.compiled[name] for name in names]
        yield line(
            row.case,
            row.direction,
            f"`{row.kernel}`",
            _each(c.num_warps for c in found),
            _each(c.registers for c in found),
            _each(c.spilled for c in found),
            _each(f"{c.shared / 1024:.1f}" for c in found),
            _each(row.resident_warps[name] for name in names),
            _each(c.tensor_cores or "-" for c in found),
        )


def summary_lines(rows: Sequence[KernelRow]) -> Iterator[str]:
    """One line for all kernels of a configuration in a dtype: the worst of each number."""
    names = list(rows[0].compiled)
    yield from header(
        "heads", "dtype", "launches", "registers, most", "spilled, most", "shared KB, most", "warps/SM, fewest"
    )
    for key in dict.fromkeys((row.config, row.dtype) for row in rows):
        mine = [row for row in rows if (row.config, row.dtype) == key]
        by_chip = [[row.compiled[name] for row in mine] for name in names]
        yield line(
            *key,
            len(mine),
            _each(max(c.registers for c in found) for found in by_chip),
            _each(max(c.spilled for c in found) for found in by_chip),
            _each(f"{max(c.shared for c in found) / 1024:.1f}" for found in by_chip),
            _each(min(row.resident_warps[name] for row in mine) for name in names),
        )


def traffic_lines(rows: Sequence[TrafficRow]) -> Iterator[str]:
    """Bytes and FLOPs against the least there can be."""
    columns = (
        "operation",
        "pass",
        "launches",
        "MB",
        "MB beside",
        "MB at least",
        "ratio",
        "GFLOP",
        "cost model",
        "ratio",
    )
    yield from header(*columns)
    for row in rows:
        flops = ("-", "-")
        if row.flops_minimum:
            flops = (f"{row.flops_minimum / 1e9:.3g}", f"{row.flops / row.flops_minimum:.2f}")
        yield line(
            row.case,
            row.direction,
            row.launches,
            f"{row.bytes_moved / 1e6:.3g}",
            f"{row.bytes_beside / 1e6:.3g}",
            f"{row.bytes_minimum / 1e6:.3g}",
            f"{(row.bytes_moved + row.bytes_beside) / row.bytes_minimum:.2f}",
            f"{row.flops / 1e9:.3g}",
            *flops,
        )


def _each(values: Iterator[object]) -> str:
    """The value, if it is the same for all GPUs; else one after the other."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _chip(name: str) -> str:
    chips: dict[str, str] = {arch(capability): chip.name for capability, chip in CHIPS.items()}
    return chips[name]
