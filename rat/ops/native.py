"""Kernels for the CPU: C++ beside the operations (`*/native.cpp`), compiled once on the machine that runs them.

The library is built at its first use, in a few seconds, and kept in the user's cache under a name that changes with
the sources, the compiler's options and the processor. It shares PyTorch's own threads (both use libgomp). Without a
compiler everything runs on plain PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_OPTIONS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # What the vectorizer needs; infinities and NaNs keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
# Of a thread's share, the same as in PyTorch's own elementwise operations.
FEWEST_ELEMENTS = 32768
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class Strided(ctypes.Structure):
    """A tensor as the kernels see it: (B, T, ...) whose last axis lies in one piece."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("token", ctypes.c_int64))


def strided(x: Tensor) -> Strided:
    """A view of x (B, T, ...), whose later axes must be contiguous. It does not keep x alive."""
    return Strided(x.data_ptr(), x.stride(0), x.stride(1))


def packed(x: Tensor) -> Tensor:
    """x (B, T, ...), copied if its later axes do not lie in one piece."""
    wanted = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != wanted:
            return x.contiguous()
        wanted *= size
    return x


def pointer(x: Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor start."""
    return None if x is None else x.data_ptr()


def supports(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors' dtype, the same for all of them."""
    return len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in _NAMES


def threads(work: int) -> int:
    """How many threads `work` elements deserve: waking one costs as much as a pass over some thousands of them."""
    return max(1, min(torch.get_num_threads(), work // FEWEST_ELEMENTS))


def call(name: str, dtype: torch.dtype, *args: object) -> None:
    """Run the kernel of this name for numbers of this dtype."""
    getattr(library(), f"rat_{name}_{_NAMES[dtype]}")(*args)


@functools.cache
def why_not_native() -> str | None:
    """What keeps the CPU kernels from running on this machine; None if nothing does."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    except OSError as error:
        return f"their library cannot be kept or loaded: {error} (XDG_CACHE_HOME names another folder for it)"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built if they were not yet.

    Raises:
        RuntimeError: there is no C++ compiler, or it refuses them.
        OSError: the cache cannot be written, or the library not be loaded.
    """
    here = Path(__file__).parent
    sources = sorted(here.glob("*/native.cpp"))
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (install one as c++, or let CXX name it)")
    identity = [compiler, *_OPTIONS, _processor(), *(p.read_text() for p in (here / "native.h", *sources))]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    target = _cache() / f"kernels-{digest}.so"
    if not target.exists():
        _build([compiler, *_OPTIONS, f"-I{here}"], sources, target)
    return ctypes.CDLL(str(target))


def _build(command: list[str], sources: list[Path], target: Path) -> None:
    """Compile into a temporary file beside the target, so that processes which start together do not meet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        made = subprocess.run([*command, "-o", built, *sources], capture_output=True, text=True, check=False)
        if made.returncode:
            cause = next((line for line in made.stderr.splitlines() if "error" in line), f"status {made.returncode}")
            raise RuntimeError(f"{command[0]} cannot compile them: {cause}")
        built.replace(target)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rat-lab"


def _processor() -> str:
    """Tells processors with other instructions apart, as where several kinds of machine share a home folder."""
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        return next((line for line in flags.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return platform.processor() or platform.machine()
