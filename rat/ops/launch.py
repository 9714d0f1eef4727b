"""How a Triton kernel is started: on a GPU, in Triton's interpreter on the CPU, or on paper.

Every kernel of `rat.ops` goes through `launch`. Inside `record_launches` nothing runs: the launches are kept, with
the types of their arguments, so that a machine without a GPU can compile exactly what a GPU would be given.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]


class Cost(NamedTuple):
    """What a launch moves and computes, by count; a multiply-add counts 2."""

    bytes_read: int
    bytes_written: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of a kernel, as it would be given to the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, torch.dtype | int | float]  # a tensor stands as its dtype
    unaligned: frozenset[str]  # tensors whose address is no multiple of 16 bytes, which the compiler is told
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    cost: Cost


class _Recording(NamedTuple):
    capability: Capability
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def record_launches(capability: Capability) -> Iterator[list[Launch]]:
    """Collect what would be launched on a GPU of this compute capability instead of launching it.

    Operations may be called on CPU tensors inside; their results are uninitialised memory.
    """
    global _recording
    before = _recording
    _recording = _Recording(capability, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def is_recording() -> bool:
    """Whether launches are only written down."""
    return _recording is not None


def capability(device: torch.device) -> Capability:
    """Compute capability of the GPU that launches go to; (0, 0) in the interpreter, where no tile is too large."""
    if _recording is not None:
        return _recording.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | int | float,
    cost: Cost,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Start `kernel` on `grid` programs.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes, each at least 1.
        args: its arguments in order, without the constexpr ones.
        cost: what all programs together move and compute.
        num_warps: of a program.
        num_stages: depth of the software pipeline of its loops.
        constants: its constexpr arguments.
    """
    if _recording is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in args]
        _recording.launches.append(
            Launch(
                kernel=kernel,
                grid=grid,
                args=dict(zip(names, kinds, strict=True)),
                unaligned=frozenset(n for n, a in zip(names, args, strict=True) if _is_unaligned(a)),
                constants=constants,
                num_warps=num_warps,
                num_stages=num_stages,
                cost=cost,
            )
        )
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def _is_unaligned(argument: Tensor | int | float) -> bool:
    return isinstance(argument, Tensor) and argument.data_ptr() % 16 != 0
