from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from rat import ops
from rat.ops.backend import select

X = torch.ones(1, 3, 2, 4)
OPS = (gated_scan, chunk_scan, chunk_attention, rotary, sliding_window)
CALLS: dict[str, Callable[..., object]] = {
    "gated_scan": lambda **which: ops.gated_scan(X[0], [X[0]], **which),
    "chunk_scan": lambda **which: ops.chunk_scan(X[0], [X[0]], chunk_size=2, **which),
    "chunk_attention": lambda **which: ops.chunk_attention(X, X, X, chunk_size=2, **which),
    "rotary": lambda **which: ops.rotary(X, torch.arange(3), **which),
    "sliding_window_attention": lambda **which: ops.sliding_window_attention(X, X, X, window_size=1, **which),
}


@pytest.fixture(autouse=True)
def _auto_before_and_after() -> Iterator[None]:
    assert ops.get_backend() == "auto"
    yield
    ops.set_backend("auto")


@pytest.fixture(params=CALLS)
def implementations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An op whose implementations only tell which one ran."""

    def telling(module: ModuleType) -> Callable[..., str]:
        return lambda *inputs: module.__name__.rpartition(".")[2]

    for module in MODULES[request.param]:
        monkeypatch.setattr(module, request.param, telling(module))
    return request.param


@pytest.mark.parametrize(
    ("process_wide", "in_the_call", "runs"),
    [
        ("auto", None, "portable"),
        ("portable", None, "portable"),
        ("reference", None, "reference"),
        ("reference", "auto", "portable"),
        ("reference", "portable", "portable"),
        ("portable", "reference", "reference"),
    ],
)
def test_a_call_overrules_the_process_wide_choice(
    implementations: str, process_wide: ops.Backend, in_the_call: ops.Backend | None, runs: str
) -> None:
    ops.set_backend(process_wide)
    assert CALLS[implementations](backend=in_the_call) == runs


def test_a_with_block_puts_the_choice_back_even_after_an_error() -> None:
    with ops.use_backend("reference"):
        with ops.use_backend("portable"):
            assert ops.get_backend() == "portable"
        assert ops.get_backend() == "reference"
    with pytest.raises(RuntimeError, match="stop"), ops.use_backend("reference"):
        raise RuntimeError("stop")
    assert ops.get_backend() == "auto"


def test_every_named_backend_but_auto_is_implemented_by_every_op() -> None:
    for call in CALLS.values():
        for backend in ops.BACKENDS:
            call(backend=backend)


@pytest.mark.parametrize(
    "choose",
    [
        ops.set_backend,
        lambda name: ops.use_backend(name).__enter__(),
        lambda name: select({"reference": print, "portable": print}, name),
        *[lambda name, call=call: call(backend=name) for call in CALLS.values()],
    ],
)
def test_an_unknown_backend_is_named_with_those_there_are(choose: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"unknown kernel backend 'cuda'.*auto, reference, portable"):
        choose("cuda")
    assert ops.get_backend() == "auto"
