import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.ops import Backend, rotary

BOTH: list[Backend] = ["reference", "portable"]


@pytest.mark.parametrize("backend", BOTH)
def test_the_first_half_is_paired_with_the_second(backend: Backend) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    fast, slow = 5.0, 5.0 * 100**-0.5  # position 5, base 100: pair i turns by 5 * 100^(-2i/4)
    expected = [
        1 * math.cos(fast) - 3 * math.sin(fast),
        2 * math.cos(slow) - 4 * math.sin(slow),
        1 * math.sin(fast) + 3 * math.cos(fast),
        2 * math.sin(slow) + 4 * math.cos(slow),
    ]
    turned = rotary(x, torch.tensor([5]), base=100.0, backend=backend)
    assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", BOTH)
def test_a_product_depends_on_the_distance_alone(backend: Backend, draw: Callable[..., Tensor]) -> None:
    q, k = draw(0, 1, 1, 3, 8), draw(1, 1, 1, 3, 8)

    def product(at: int, other: int) -> Tensor:
        a, b = (rotary(x, torch.tensor([p]), base=50.0, backend=backend) for x, p in ((q, at), (k, other)))
        return (a * b).sum(-1)

    torch.testing.assert_close(product(9, 4), product(1005, 1000), atol=1e-9, rtol=0)
    assert not torch.allclose(product(9, 4), product(4, 9))


@pytest.mark.parametrize("backend", BOTH)
def test_position_zero_and_the_backward_of_a_turn_are_exact(backend: Backend, draw: Callable[..., Tensor]) -> None:
    x = draw(0, 2, 3, 2, 6).requires_grad_()
    assert torch.equal(rotary(x, torch.zeros(3, dtype=torch.int64), backend=backend), x)
    turned = rotary(x, torch.tensor([[3, 1, 2], [9, 8, 7]]), backend=backend)
    # a turn is orthogonal: its transpose, the backward, takes the output to the input
    (back,) = torch.autograd.grad(turned, x, turned)
    torch.testing.assert_close(back, x.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BOTH)
def test_positions_by_row_are_each_rows_own(backend: Backend, draw: Callable[..., Tensor]) -> None:
    x, places = draw(0, 2, 4, 3, 6), torch.tensor([[0, 1, 2, 3], [7, 0, 1, 5]])
    together = rotary(x, places, backend=backend)
    for row in range(2):
        assert torch.equal(together[row], rotary(x, places[row], backend=backend)[row])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "heads", "width"), [(1, 1, 2), (5, 3, 8), (33, 2, 6)])
def test_portable_equals_reference(
    dtype: torch.dtype,
    length: int,
    heads: int,
    width: int,
    draw: Callable[..., Tensor],
    differentiate: Callable[..., dict[str, Tensor]],
) -> None:
    inputs = {"x": draw(0, 2, length, heads, width)}
    places = torch.randint(0, 50_000, (2, length), generator=torch.Generator().manual_seed(1))
    portable, reference = (
        differentiate(lambda x, which=which: rotary(x, places, backend=which), inputs, dtype) for which in BOTH[::-1]
    )
    assert portable["output 0"].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(portable, reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rounds_only_the_result(
    backend: Backend, dtype: torch.dtype, draw: Callable[..., Tensor]
) -> None:
    # at position 3,000,001 an angle formed in fp32 would be off by a tenth of a turn
    x, places = draw(0, 1, 3, 2, 8), torch.tensor([1, 100_003, 3_000_001])
    exact = rotary(x, places, backend="reference")
    actual = rotary(x.to(dtype), places, backend=backend).double()
    torch.testing.assert_close(actual, exact, atol=1e-6, rtol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((2, 3, 4), (3,), r"rotary needs \(B, T, heads, an even d\), got \(2, 3, 4\)"),
        ((2, 3, 4, 5), (3,), r"rotary needs .* an even d\), got \(2, 3, 4, 5\)"),
        ((2, 3, 4, 6), (4,), r"positions \(4,\) fit neither"),
        ((2, 3, 4, 6), (1, 3), r"positions \(1, 3\) fit neither"),
        ((2, 3, 4, 6), (), r"positions \(\) fit neither"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shape: tuple[int, ...], positions: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(shape), torch.zeros(positions, dtype=torch.int64))
