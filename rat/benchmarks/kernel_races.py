"""The kernels on a GPU: as exact as PyTorch in the same dtype, and how fast beside it and beside the floor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rat.benchmarks.floors import Work
from rat.benchmarks.kernel_cases import CASES, DTYPES, Call, Case, Shape, random_fill
from rat.benchmarks.provenance import machine
from rat.benchmarks.report import Report
from rat.benchmarks.timing import Rates, interleaved, measure_rates
from rat.markdown import header, line, write_block
from rat.ops.backend import Backend

Values = dict[str, Tensor]
# Rows that decode side by side: one for so many tokens that would be trained on.
_TOKENS_A_ROW = 512


@dataclass(frozen=True, kw_only=True)
class Race:
    """A version of an operation in one pass at one size."""

    config: str
    dtype: str
    case: str
    direction: str  # forward, or train: forward and backward
    backend: str
    error: float  # the largest of all values, as a share of what is allowed
    milliseconds: float  # median
    iqr_milliseconds: float
    floor_milliseconds: float
    bytes_per_second: float  # of the bytes that the operation needs at least
    flops_per_second: float | None  # of the cost model's
    speedup: float  # against the portable version


def check_and_time(
    configs: Mapping[str, tuple[Shape, tuple[torch.dtype, ...]]],
    tokens: int,
    repeats: int,
    device: torch.device,
    report: Report,
    page: Path | None,
) -> list[str]:
    """Check and time every operation, print a table for each config and dtype; what is not exact enough, in words."""
    races: list[Race] = []
    lines: list[str] = [machine(device), ""]
    # Triton's interpreter, which stands in for a GPU on a CPU, cannot multiply in bf16.
    dtypes = DTYPES if device.type == "cuda" else tuple(kind for kind in DTYPES if kind != torch.bfloat16)
    for config, (shape, _) in configs.items():
        large = replace(shape, batch_size=max(1, tokens // shape.seq_len))
        decoding = replace(shape, batch_size=max(1, tokens // _TOKENS_A_ROW))
        for dtype in dtypes:
            rates = measure_rates(dtype, device)
            title = [f"#### {config}, {_name(dtype)}: {large}", "", f"{rates}; medians of {repeats} rounds.", ""]
            found: list[Race] = []
            for name, case in CASES.items():
                race = partial(Race, config=config, dtype=_name(dtype), case=name)
                size = decoding if case.function == "chunk_decode" else large
                found += _race(case, shape, size, dtype, repeats, device, rates, race)
                report.put("rows", races + found)
            races += found
            table = [*title, *race_lines(found), ""]
            print("\n".join(table), flush=True)
            lines += table
    if page is not None:
        write_block(page, f"measured on {machine(device).partition(',')[0]}", lines)
    return [
        f"{race.backend}, {race.case} ({race.config}, {race.dtype}): {race.error:.1f} x what is allowed"
        for race in races
        if race.direction == "forward" and not race.error <= 1  # which NaN is not
    ]


def _race(
    case: Case,
    shape: Shape,
    large: Shape,
    dtype: torch.dtype,
    repeats: int,
    device: torch.device,
    rates: Rates,
    race: Callable[..., Race],
) -> Iterator[Race]:
    """The rows of one operation: every version that runs on this device, forward and, where it trains, both."""
    versions = contenders(case, dtype, device)
    errors = errors_of(case, shape, dtype, device, versions)
    call = case.make(large, random_fill(0, dtype, device))
    for direction in ("forward", "train") if call.trains else ("forward",):
        run = train if direction == "train" else forward
        turns = {name: partial(run, call, name) for name in versions}
        measured = interleaved(turns, repeats, device, f"{case.function}, {direction}")
        work = _work(call, direction == "train")
        for name in versions:
            seconds = measured[name].median
            yield race(
                direction=direction,
                backend=name,
                error=errors[name],
                milliseconds=1e3 * seconds,
                iqr_milliseconds=1e3 * measured[name].iqr,
                floor_milliseconds=1e3 * work.floor(rates).seconds,
                bytes_per_second=work.num_bytes / seconds,
                flops_per_second=work.flops / seconds if work.flops else None,
                speedup=measured["portable"].median / seconds,
            )


def contenders(case: Case, dtype: torch.dtype, device: torch.device) -> list[Backend]:
    """The versions to compare; FlexAttention only where `auto` may take it."""
    names: list[Backend] = ["triton", "flex", "portable"]
    flex = device.type == "cuda" and dtype != torch.float32
    return [name for name in names if name in case.versions() and (name != "flex" or flex)]


def forward(call: Call, backend: Backend) -> None:
    """The forward pass alone."""
    with torch.no_grad():
        call.run(call.tensors, backend)


def train(call: Call, backend: Backend) -> None:
    """Forward and backward, with gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    outputs = [out for out in call.run(leaves, backend) if out.requires_grad]
    torch.autograd.grad(outputs, list(leaves.values()), [out.detach() for out in outputs], allow_unused=True)


def _work(call: Call, training: bool) -> Work:
    """What the operation needs at least."""
    with torch.no_grad():
        outputs = call.run(call.tensors, "portable")
    num_bytes = call.bytes_forward(outputs) + (call.bytes_backward(outputs) if training else 0)
    return Work(flops=(call.flops or 0) * (3 if training else 1), num_bytes=num_bytes)


def errors_of(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, versions: list[Backend]
) -> dict[Backend, float]:
    """The largest error of each version's outputs and gradients, as a share of what is allowed.

    Allowed is twice the error that the portable version makes in the same dtype, against the reference in fp64, and
    one rounding of the largest value. Rows are a few chunks, a few tiles of the kernels, and a tail long.
    """
    small = replace(shape, seq_len=min(shape.seq_len, max(8 * shape.chunk_size, 256)) + 5, batch_size=2)
    exact = outcome(case, small, dtype, device, "reference", torch.float64)
    plain = outcome(case, small, dtype, device, "portable")
    errors = {}
    for name in versions:
        ours = plain if name == "portable" else outcome(case, small, dtype, device, name)
        shares = [
            _largest(ours[value] - true)
            / (2 * _largest(plain[value] - true) + torch.finfo(dtype).eps * max(1.0, _largest(true)))
            for value, true in exact.items()
        ]
        errors[name] = max(shares) if all(share == share for share in shares) else float("nan")
    return errors


def outcome(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    computed_in: torch.dtype | None = None,
) -> Values:
    """Outputs and, where the operation trains, gradients for fixed weights on the outputs, in fp64.

    Inputs are rounded to `dtype`; `computed_in` then takes them into another one.
    """
    call = case.make(shape, random_fill(0, dtype, device))
    tensors = {name: x if computed_in is None else x.to(computed_in) for name, x in call.tensors.items()}
    leaves = {name: x.detach().requires_grad_(call.trains) for name, x in tensors.items()}
    with torch.set_grad_enabled(call.trains):
        outputs = call.run(leaves, backend)
    values = {f"output {i}": out.detach().double() for i, out in enumerate(outputs)}
    if call.trains:
        fill = random_fill(1, dtype, device)
        weights = [fill(*out.shape).to(out.dtype) for out in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
        values |= {f"gradient of {name}": grad.double() for name, grad in zip(leaves, gradients, strict=True)}
    return values


def race_lines(races: list[Race]) -> Iterator[str]:
    """The table of a config and dtype."""
    yield from header(
        "operation",
        "pass",
        "version",
        "error / allowed",
        "ms",
        "IQR",
        "floor ms",
        "ms / floor",
        "GB/s",
        "TFLOP/s",
        "speedup",
    )
    for race in races:
        yield line(
            race.case,
            race.direction,
            race.backend,
            f"{race.error:.2f}",
            f"{race.milliseconds:.3f}",
            f"{race.iqr_milliseconds:.3f}",
            f"{race.floor_milliseconds:.3f}",
            f"{race.milliseconds / race.floor_milliseconds:.2f}",
            f"{race.bytes_per_second / 1e9:.0f}",
            "-" if race.flops_per_second is None else f"{race.flops_per_second / 1e12:.2f}",
            f"{race.speedup:.2f}x",
        )


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
