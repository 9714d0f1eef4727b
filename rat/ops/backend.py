"""Which implementation of an operation runs.

Every operation of `rat.ops` offers the same function several times: `reference` (executable mathematics),
`portable` (PyTorch at full speed on any device). A call may name one; otherwise the process-wide choice of
`set_backend` holds, and `auto` takes the fastest that can run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

Backend = Literal["auto", "reference", "portable"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

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


def select(implementations: Mapping[str, F], backend: Backend | None) -> F:
    """The implementation that `backend` (or the process-wide choice, when None) stands for."""
    name = _check(backend or _chosen)
    return implementations["portable" if name == "auto" else name]


def _check(backend: Backend) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return backend
