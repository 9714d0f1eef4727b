from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rat.ops import output_gate
from rat.ops.backend import why_not_native

Maker = Callable[..., dict[str, Tensor]]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
fast_backends = pytest.mark.parametrize("backend", ["portable", NATIVE])


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda *shape: {"gate_logits": 3 * draw(0, *shape), "x": draw(1, *shape)}


@every_backend
def test_hand_made_numbers(backend: str) -> None:
    z = torch.tensor([0.0, 3.0, 1 / 3]).log().view(1, 1, 3).requires_grad_()  # gates of 0, 3/4, 1/4
    x = torch.tensor([[[5.0, 8.0, -4.0]]], requires_grad=True)
    out = output_gate(z, x, backend=backend)
    assert out.flatten().tolist() == pytest.approx([0, 6, -1])
    of_z, of_x = torch.autograd.grad(out, (z, x), torch.tensor([[[2.0, 1.0, 2.0]]]))
    assert of_x.flatten().tolist() == pytest.approx([0, 0.75, 0.5])
    assert of_z.flatten().tolist() == pytest.approx([0, 1.5, -1.5])


@fast_backends
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (1, 7, 33), (2, 5, 64), (2, 3, 100)])
def test_the_fast_versions_equal_the_reference(
    backend: str, shape: tuple[int, ...], inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    ours = differentiate(partial(output_gate, backend=backend), inputs(*shape), torch.float32)
    assert_same(ours, differentiate(partial(output_gate, backend="reference"), inputs(*shape)), 1e-6)


@fast_backends
def test_one_token_of_longer_rows(backend: str, inputs: Maker) -> None:
    z, x = (tensor.float() for tensor in inputs(3, 4, 5).values())
    torch.testing.assert_close(output_gate(z[:, 2:3], x[:, 2:3], backend=backend), (torch.sigmoid(z) * x)[:, 2:3])


@fast_backends
def test_bf16_is_no_worse_than_the_plain_formula(
    backend: str, inputs: Maker, differentiate: Maker, assert_no_worse: Callable[..., None]
) -> None:
    tensors = inputs(2, 9, 100)
    ours = differentiate(partial(output_gate, backend=backend), tensors, torch.bfloat16)
    plain = differentiate(lambda gate_logits, x: torch.sigmoid(gate_logits) * x, tensors, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in ours.values())
    assert_no_worse(ours, plain, differentiate(partial(output_gate, backend="reference"), tensors))


@every_backend
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_result_has_the_dtype_of_x_and_gradients_those_of_the_inputs(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], inputs: Maker
) -> None:
    exact = output_gate(**inputs(1, 3, 4), backend="reference")
    tensors = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs(1, 3, 4).values(), dtypes, strict=True)]
    out = output_gate(*tensors, backend=backend)
    assert out.dtype == dtypes[1]
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
    assert [x.dtype for x in torch.autograd.grad(out.sum(), tensors)] == list(dtypes)


@fast_backends
def test_the_backward_keeps_the_inputs_alone(backend: str, inputs: Maker) -> None:
    tensors = [x.float().requires_grad_() for x in inputs(2, 3, 8).values()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        output_gate(*tensors, backend=backend)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in tensors}


@every_backend
def test_gates_that_are_open_or_shut_are_exact(backend: str) -> None:
    z = torch.tensor([-1e30, -100.0, 100.0, 1e30]).view(1, 1, 4).requires_grad_()
    out = output_gate(z, torch.full((1, 1, 4), 3.0), backend=backend)
    assert out.flatten().tolist() == pytest.approx([0, 0, 3, 3], abs=1e-30)
    (of_z,) = torch.autograd.grad(out.sum(), z)
    assert of_z.flatten().tolist() == pytest.approx([0] * 4, abs=1e-30)


@pytest.mark.parametrize(
    ("gate_logits", "x", "message"),
    [
        ((2, 5, 6), (2, 5, 4), r"alike, got \(2, 5, 6\), \(2, 5, 4\)"),
        ((5, 6), (5, 6), r"\(B, T, D\) alike, got \(5, 6\), \(5, 6\)"),
        ((2, 1, 6), (2, 5, 6), r"alike, got \(2, 1, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(gate_logits: tuple[int, ...], x: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_gate(torch.zeros(gate_logits), torch.zeros(x))
