"""Kernels compiled for GPUs that are not here, exactly as those would get them, and what they would need there.

Triton's own front door is used: `warmup` specialises the arguments and compiles as a launch would, for the GPU that
the active driver names. The driver here names one that is not there. What the kernel needs stands in the result:
registers and spilled bytes in the cubin, shared memory in its metadata, the tensor cores' instructions in the PTX.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rat.ops.backend import HAS_TRITON, INTERPRETED
from rat.ops.launch import Capability, Launch


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Limits of a multiprocessor (CUDA C++ programming guide, technical specifications per compute capability)."""

    name: str
    shared_per_block: int  # bytes
    shared: int  # bytes
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 0  # of tensor memory


CHIPS: dict[Capability, Chip] = {
    (8, 0): Chip(name="A100", shared_per_block=163 * 1024, shared=164 * 1024),
    (9, 0): Chip(name="H100", shared_per_block=227 * 1024, shared=228 * 1024),
    (10, 0): Chip(name="B200", shared_per_block=227 * 1024, shared=228 * 1024, tensor_columns=512),
}
# Each block takes so many bytes of shared memory for the system; registers are given out to a warp by so many.
_SYSTEM_SHARED, _REGISTERS_AT_ONCE, _WARPS_AT_ONCE = 1024, 256, 4
_TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a kernel needs on a GPU."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that lie in memory
    shared: int  # bytes of a block
    tensor_columns: int  # of tensor memory, of a block
    num_warps: int
    tensor_cores: str  # tcgen05, wgmma, mma, or nothing

    def resident_warps(self, chip: Chip) -> int:
        """Warps that a multiprocessor holds at once: the estimate of the occupancy."""
        per_warp = -(-self.registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
        by_registers = chip.registers // max(per_warp, 1) // _WARPS_AT_ONCE * _WARPS_AT_ONCE
        blocks = min(
            chip.blocks,
            chip.warps // self.num_warps,
            by_registers // self.num_warps,
            chip.shared // (self.shared + _SYSTEM_SHARED),
            chip.tensor_columns // self.tensor_columns if self.tensor_columns else chip.blocks,
        )
        return blocks * self.num_warps

    def faults(self, chip: Chip) -> list[str]:
        """Why it is not fit for the chip; empty if it is."""
        found = [f"{self.spilled} bytes of registers spilled"] if self.spilled else []
        if self.shared > chip.shared_per_block:
            found.append(f"{self.shared} bytes of shared memory, {chip.name} gives a block {chip.shared_per_block}")
        if not self.resident_warps(chip):
            found.append("no block fits on a multiprocessor")
        return found


def check_compiler() -> None:
    """Raise ValueError where kernels cannot be compiled ahead of time."""
    if not HAS_TRITON:
        raise ValueError("kernels cannot be compiled here: the package triton is not installed")
    if INTERPRETED:
        raise ValueError(
            "kernels cannot be compiled: TRITON_INTERPRET=1 makes them Python functions; run this without that variable"
        )


def compile_launches(
    launches: Sequence[Launch], capability: Capability, done: Callable[[int], object] = lambda count: None
) -> list[Compiled]:
    """Compile each launch for GPUs of this capability; equal ones only once, and none that Triton's cache holds.

    Args:
        launches: of `record_launches`.
        capability: of the GPU.
        done: is told after each compilation how many launches that was.

    Raises:
        ValueError: there is no compiler, or the kernels are interpreted.
        RuntimeError: a kernel does not compile; it is named.
    """
    check_compiler()
    names = [_identity(launch) for launch in launches]
    distinct = dict(zip(names, launches, strict=True))
    compiled = {}
    with _pretend(capability), ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, result in zip(distinct, pool.map(_compile, distinct.values()), strict=True):
            compiled[name] = result
            done(names.count(name))
    return [compiled[name] for name in names]


def _identity(launch: Launch) -> str:
    rest = (launch.args, launch.unaligned, launch.constants, launch.num_warps, launch.num_stages)
    return f"{launch.kernel.__module__}.{launch.kernel.__name__} {rest}"


def _compile(launch: Launch) -> Compiled:
    from triton.runtime.jit import MockTensor

    class Unaligned(MockTensor):  # type: ignore[misc]
        @staticmethod
        def data_ptr() -> int:
            return 4

    # a dtype stands for a tensor
    args = [Unaligned(kind) if name in launch.unaligned else kind for name, kind in launch.args.items()]
    try:
        built = launch.kernel.warmup(
            *args, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages, **launch.constants
        )
    except Exception as error:
        raise RuntimeError(f"{launch.kernel.__name__} does not compile with {launch.constants}: {error}") from error
    ptx = built.asm["ptx"]
    used = [name for name, instruction in _TENSOR_CORES.items() if instruction in ptx]
    registers, spilled = _resources(built.asm["cubin"])
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=built.metadata.shared,
        tensor_columns=getattr(built.metadata, "tmem_size", None) or 0,
        num_warps=built.metadata.num_warps,
        tensor_cores=used[0] if used else "",
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of them that are spilled, as NVIDIA's tool reads them from a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said)
    if not found:
        raise RuntimeError(f"cuobjdump tells no registers: {said!r}")
    return max(int(r) for r, _, _ in found), max(int(stack) + int(local) for _, stack, local in found)


@contextmanager
def _pretend(capability: Capability) -> Iterator[None]:
    """Let Triton believe in a GPU of this capability."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = capability
    arch = 10 * major + minor
    before = driver._active
    driver.set_active(_Absent(arch, GPUTarget("cuda", arch, 32)))
    try:
        yield
    finally:
        driver._active = before


class _Absent:
    """What Triton's compiler asks of a driver; a number of its own for each GPU keeps the kernels apart."""

    def __init__(self, number: int, target: Any) -> None:
        self.number, self.target = number, target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def arch(capability: Capability) -> str:
    """As NVIDIA writes it: sm_80."""
    return "sm_{}{}".format(*capability)


def capability_of(arch: int) -> Capability:
    """80 -> (8, 0). Raises ValueError for a GPU whose limits are not known here."""
    capability = divmod(arch, 10)
    if capability not in CHIPS:
        known = ", ".join(str(10 * major + minor) for major, minor in CHIPS)
        raise ValueError(f"unknown compute capability {arch}: choose from {known}")
    return capability
