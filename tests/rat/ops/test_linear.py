from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rat.ops import linear
from rat.ops.backend import why_not_native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
fast_backends = pytest.mark.parametrize("backend", ["portable", NATIVE])
LARGE = (640, 512)  # (O, D) that oneDNN is faster for
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def products(run: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return {event.key for event in seen.key_averages()} & {"aten::linear", "mkldnn::_linear_pointwise"}


@every_backend
def test_hand_made_numbers(backend: str) -> None:
    x, weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.0], [1.0, 5.0], [0.0, 2.0]])
    assert linear(x, weight, backend=backend).tolist() == [[3, 11, 4], [0, -5, -2]]


@fast_backends
@pytest.mark.parametrize("rows", [(), (1,), (3,), (32, 1), (2, 65, 3), (0,), (2, 0)])
@pytest.mark.parametrize("shape", [(3, 5), LARGE, (515, 513)])
def test_the_fast_versions_equal_the_reference(
    backend: str, rows: tuple[int, ...], shape: tuple[int, int], draw: Callable[..., Tensor]
) -> None:
    x, weight = draw(0, *rows, shape[1]), draw(1, *shape)
    ours = linear(x.float(), weight.float(), backend=backend)
    assert ours.is_contiguous()
    exact = linear(x, weight, backend="reference")
    torch.testing.assert_close(ours.double(), exact, atol=4e-6 * shape[1] ** 0.5, rtol=0)


@fast_backends
def test_rows_that_are_not_next_to_each_other(backend: str, draw: Callable[..., Tensor]) -> None:
    x, weight = draw(0, 4, 6, 2 * LARGE[1]).float(), draw(1, LARGE[1], LARGE[0]).float()
    parts = x[:, -1, ::2], x[1::2, 2:4, LARGE[1] :], x[:, 0, 3 : 3 + LARGE[1]]
    for part in parts:
        torch.testing.assert_close(linear(part, weight.mT, backend=backend), part @ weight, atol=1e-4, rtol=1e-5)


@fast_backends
@pytest.mark.parametrize("wanted", ["x and weight", "x", "weight"])
def test_gradients(wanted: str, backend: str, draw: Callable[..., Tensor]) -> None:
    x, weight = draw(0, 2, 3, LARGE[1]).float(), draw(1, *LARGE).float()
    grad = draw(2, 2, LARGE[0], 3).float().mT
    inputs = [y.requires_grad_() for name, y in (("x", x), ("weight", weight)) if name in wanted]
    ours = torch.autograd.grad(linear(x, weight, backend=backend), inputs, grad)
    theirs = torch.autograd.grad(linear(x, weight, backend="reference"), inputs, grad)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@needs_onednn
@pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++")
def test_onednn_multiplies_where_it_is_faster_and_only_there() -> None:
    x, weight, small = torch.ones(2, LARGE[1]), torch.ones(LARGE), torch.ones(4, LARGE[1])
    assert products(lambda: linear(x, weight, backend="native")) == {"mkldnn::_linear_pointwise"}
    assert products(lambda: linear(x, weight, backend="portable")) == {"aten::linear"}
    assert products(lambda: linear(x, small, backend="native")) == {"aten::linear"}
    assert products(lambda: linear(x, weight.requires_grad_(), backend="native")) == {"mkldnn::_linear_pointwise"}
    with torch.no_grad():
        assert products(lambda: linear(x[0], weight, backend="native")) == {"aten::linear"}
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, backend="native").dtype == torch.bfloat16
        assert linear(x.bfloat16(), weight.bfloat16(), backend="native").dtype == torch.bfloat16
        compiled = torch.compile(partial(linear, backend="native"), fullgraph=True, backend="eager")
        assert products(lambda: compiled(x, weight)) == {"aten::linear"}


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 5), (3, 4), r"got \(2, 5\), \(3, 4\)"),
        ((), (3, 4), r"got \(\), \(3, 4\)"),
        ((2, 4), (4,), r"\(O, D\), got \(2, 4\), \(4,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(torch.zeros(x), torch.zeros(weight))
