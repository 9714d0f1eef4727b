"""Which implementation of an operation runs.

The folder of an operation holds the same function several times: `reference` (executable mathematics), `portable`
(PyTorch at full speed on any device), and, where it pays, `native` (our kernels for CPUs), `flex` (PyTorch's
FlexAttention) and `triton` (our kernels for GPUs). A call may name one; otherwise the process-wide choice of
`set_backend` holds, and `auto` takes the fastest that can run. An operation without the version that was asked for
takes the next simpler one: there is no Triton version of what FlexAttention or plain PyTorch does as well.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from rat.ops import native
from rat.ops.launch import Capability, is_recording

Backend = Literal["auto", "reference", "portable", "native", "flex", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is defined, so that it has to be set before `rat` is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Ampere, the first GPUs with bf16 in their matrix units; the kernels are built and checked from here on.
OLDEST_GPU: Capability = (8, 0)

F = TypeVar("F", bound=Callable[..., object])

_chosen: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Choose the implementation of every following call that does not name one."""
    global _chosen
    _chosen = _check(backend)


def get_backend() -> Backend:
    """The process-wide choice."""
    return _chosen


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = _chosen
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def implementations(folder: str, function: str) -> dict[str, Callable[..., Any]]:
    """The versions of an operation, by name: the modules of its `folder` that hold the `function`."""
    names = [name for name in BACKENDS if importlib.util.find_spec(f"{folder}.{name}")]
    names = [name for name in names if name != "triton" or HAS_TRITON]
    return {name: getattr(importlib.import_module(f"{folder}.{name}"), function) for name in names}


def select(versions: Mapping[str, F], backend: Backend | None, like: Tensor) -> F:
    """The implementation that `backend` (or the process-wide choice, when None) stands for.

    Args:
        versions: of `implementations`.
        backend: the caller's choice.
        like: one of the inputs; its device and dtype decide what can run.

    Raises:
        ValueError: the backend is unknown, or cannot run on that device.
    """
    name = _check(backend or _chosen)
    if name == "auto":
        name = _fastest(like.device) if like.dtype != torch.float64 else "portable"
    elif name == "triton":
        _refuse(name, why_not_triton(like.device))
    elif name == "native":
        _refuse(name, why_not_native(like.device))
    if name not in versions:
        name = "flex" if name == "triton" and "flex" in versions and _flex_pays(like) else "portable"
    return versions[name]


def _flex_pays(like: Tensor) -> bool:
    """Whether FlexAttention is a faster version where nobody asked for it.

    On a CPU it has no backward. In fp32 its forward kernel keeps 7 KB of a thread's registers in memory (compiled for
    sm_80 and sm_90 by torch 2.13).
    """
    return like.device.type == "cuda" and like.dtype.itemsize == 2


def _fastest(device: torch.device) -> Backend:
    """What `auto` stands for on this device."""
    if why_auto_avoids_triton(device) is None:
        return "triton"
    return "portable" if why_not_native(device) else "native"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_native(device: torch.device) -> str | None:
    """What keeps the CPU kernels from running on tensors of this device; None if nothing does."""
    if device.type != "cpu":
        return f"its kernels are for the CPU, and the tensors are on the {device.type}"
    return native.why_not_native()


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton kernels from running on tensors of this device; None if nothing does."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if is_recording() or INTERPRETED:
        return None
    if device.type != "cuda":
        return f"its kernels need an NVIDIA GPU, and the tensors are on the {device.type}"
    found = gpu_capability(device)
    if found < OLDEST_GPU:
        have, need = (f"sm_{major}{minor}" for major, minor in (found, OLDEST_GPU))
        return f"its kernels need {need} or newer, and this GPU is {have}"
    return None


def why_auto_avoids_triton(device: torch.device) -> str | None:
    """Why `auto` takes PyTorch on this device; None if it takes Triton.

    Triton's interpreter runs kernels a thousand times slower than PyTorch does their work: it has to be asked for.
    """
    if INTERPRETED and not is_recording():
        return "with TRITON_INTERPRET=1 its kernels run in an interpreter"
    return why_not_triton(device)


def describe_backend(backend: Backend, device: torch.device, training: bool) -> str:
    """What a choice means on this device, and why, in one line.

    Args:
        backend: the choice.
        device: where the tensors are going to be.
        training: whether there is going to be a backward pass.

    Raises:
        ValueError: the choice cannot run there.
    """
    if _check(backend) == "auto":
        fastest = _fastest(device)
        reason = "the fastest there"
        if fastest == "portable" and device.type == "cpu":
            reason = f"not native: {why_not_native(device)}"
        elif fastest == "portable":
            reason = f"not triton: {why_auto_avoids_triton(device)}"
        return f"kernel backend auto: {fastest} on {_named(device)}, {reason}"
    if backend == "triton":
        _refuse(backend, why_not_triton(device))
    if backend == "native":
        _refuse(backend, why_not_native(device))
    if backend == "flex" and training:
        _refuse_flex(device)
    return f"kernel backend {backend} on {_named(device)}, as it was asked for"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these tensors could be asked for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_flex(*inputs: Tensor) -> None:
    """Raise ValueError if these inputs want gradients on a device where FlexAttention has no backward pass."""
    if needs_gradient(*inputs):
        _refuse_flex(inputs[0].device)


def _refuse_flex(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"kernel backend flex cannot train: FlexAttention has no backward pass on the {device.type};"
            " choose auto or portable, or an NVIDIA GPU"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gpu_capability(device: torch.device) -> Capability:
    """Compute capability of a GPU; a constant to torch.compile."""
    return torch.cuda.get_device_capability(device)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; without them they take longer than those in fp32."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type}"
    major, minor = gpu_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _refuse(backend: Backend, reason: str | None) -> None:
    if reason:
        raise ValueError(f"kernel backend {backend} cannot run: {reason}; choose auto or portable")


def _check(backend: Backend) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return backend
