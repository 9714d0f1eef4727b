"""Which implementation of an operation runs.

The folder of an operation holds the same function several times: `reference` (executable mathematics), `portable`
(PyTorch at full speed on any device), and, where it pays, `flex` (PyTorch's FlexAttention) and `triton` (our
kernels). A call may name one; otherwise the process-wide choice of `set_backend` holds, and `auto` takes the fastest
that can run. An operation without the version that was asked for takes the next simpler one: there is no Triton
version of what FlexAttention or plain PyTorch does as well.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from rat.ops.launch import is_recording

Backend = Literal["auto", "reference", "portable", "flex", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is defined, so that it has to be set before `rat` is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

F = TypeVar("F", bound=Callable[..., object])

_chosen: Backend = "auto"
_SIMPLER = {"triton": "flex", "flex": "portable"}


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
        like: one of the inputs; its device decides what can run.

    Raises:
        ValueError: the backend is unknown, or cannot run on that device.
    """
    name: str = _check(backend or _chosen)
    if name == "auto":
        name = "portable" if why_not_triton(like.device) else "triton"
    elif name == "triton" and (reason := why_not_triton(like.device)):
        raise ValueError(f"kernel backend triton cannot run: {reason}; choose auto or portable")
    while name not in versions:
        name = _SIMPLER[name]
    return versions[name]


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton kernels from running on tensors of this device; None if nothing does."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if is_recording() or device.type == "cuda" or INTERPRETED:
        return None
    return f"its kernels need an NVIDIA GPU, and the tensors are on the {device.type}"


def _check(backend: Backend) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return backend
