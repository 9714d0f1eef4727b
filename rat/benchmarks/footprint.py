"""How many bytes a computation takes: what autograd keeps, what is allocated at most, what the process holds."""

import os
import platform
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def kept_bytes(run: Callable[[], object], inputs: Iterable[Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass for its backward.

    Whole storages are counted, each once, since a view keeps all of what it looks at. The parameters do not count;
    the inputs do, once, whether or not a product keeps them.

    Args:
        run: the forward pass.
        inputs: what it is given.
        parameters: what is there anyway.
    """
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks:
        result = run()
    for x in inputs:
        keep(x)
    there = {x.untyped_storage().data_ptr() for x in parameters}
    del result
    return sum(x.untyped_storage().nbytes() for where, x in kept.items() if where not in there)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made by `run` take at a time, by the allocator's own record."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    record: Any = profile.profiler
    changes = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        highest = max(highest, held)
    return highest


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors could have now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused; the CPU's has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class ProcessPeak:
    """The most memory that this process (its tensors on a GPU) has held since it was made, beyond what it held then.

    On a CPU this is what the system has really given: resident pages, fragments and workspace included. A peak from
    before cannot hide a later one on Linux only; elsewhere use a fresh process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _highest_resident()

    def bytes(self) -> int:
        """So many until now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _highest_resident() - self._before


def _highest_resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if platform.system() == "Darwin" else highest * 1024
