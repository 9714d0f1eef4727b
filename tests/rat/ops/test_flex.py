"""The versions on FlexAttention: against the reference where a CPU runs them, their gradients with a plain stand-in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from rat import ops
from rat.ops.chunk_attention import flex as chunk_flex
from rat.ops.sliding_window import flex as window_flex

LENGTH = 13
IDS = torch.tensor([[0] * 4 + [1] * 8 + [2], [5] * 9 + [6] * 4])
PAST = {"offset": torch.tensor([1, 7]), "document_ids": IDS}
ALIKE = {name: (2, LENGTH, 2, 4) for name in "qkv"}
GROUPED = ALIKE | {name: (2, LENGTH, 4, 4) for name in "kv"}
ENDS = {"end_keys": (2, 6, 4, 4), "end_values": (2, 6, 4, 4)}

Values = dict[str, Tensor]
Case = tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]


def window(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return ops.sliding_window_attention(q, k, v, **options)


def chunks(q: Tensor, k: Tensor, v: Tensor, *ends: Tensor, **options: object) -> Tensor:
    return ops.chunk_attention(q, k, v, ends=ends or None, rope_base=9.0, **options)


CASES: dict[str, Case] = {
    "a window": (partial(window, window_size=3), ALIKE),
    "a window, documents": (partial(window, window_size=3, document_ids=IDS), ALIKE),
    "documents": (partial(window, window_size=None, document_ids=IDS), ALIKE),
    "chunks": (partial(chunks, chunk_size=3), GROUPED),
    "chunks of one token": (partial(chunks, chunk_size=1), GROUPED),
    "one chunk": (partial(chunks, chunk_size=20), GROUPED),
    "chunks, documents": (partial(chunks, chunk_size=3, document_ids=IDS), GROUPED),
    "chunks, continued": (partial(chunks, chunk_size=3, **PAST), GROUPED | ENDS),
}


@pytest.fixture(autouse=True)
def _traced_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's plain form, without the seconds that torch.compile takes for each shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Callable[[str], Values]:
    return lambda name: {x: draw(i, *shape) for i, (x, shape) in enumerate(CASES[name][1].items())}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spans' attention with its mask written out, which has gradients on a CPU too."""

    def dense(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.arange(k.shape[1])
        seen = (keys >= first[..., None]) & (keys < last[..., None])
        logits = torch.einsum("bthd,bshd->bths", q, k) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
        return torch.einsum("bths,bshd->bthd", weights, v), lse

    for module in (chunk_flex, window_flex):
        monkeypatch.setattr(module, "span_attention", dense)
        monkeypatch.setattr(module, "check_flex", lambda *_: None)


@pytest.mark.parametrize("name", CASES)
def test_flex_gives_what_the_reference_gives(
    name: str, inputs: Callable[[str], Values], assert_no_worse: Callable[..., None]
) -> None:
    op, tensors = CASES[name][0], inputs(name)
    exact = {"output": op(*tensors.values(), backend="reference")}
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, None)):
        narrow = [x.to(dtype) for x in tensors.values()]
        ours = {"output": op(*narrow, backend="flex")}
        assert ours["output"].dtype == dtype
        if tolerance:
            torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)
        else:
            assert_no_worse(ours, {"output": op(*narrow, backend="portable")}, exact)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_around_it_are_those_of_the_reference(
    name: str,
    plain: None,
    inputs: Callable[[str], Values],
    differentiate: Callable[..., Values],
    assert_same: Callable[..., None],
) -> None:
    flex, reference = (
        differentiate(lambda b=backend, **t: CASES[name][0](*t.values(), backend=b), inputs(name))
        for backend in ("flex", "reference")
    )
    assert_same(flex, reference, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_a_cpu_are_refused(name: str, inputs: Callable[[str], Values]) -> None:
    tensors = [x.requires_grad_() for x in inputs(name).values()]
    with pytest.raises(ValueError, match="flex cannot train: FlexAttention has no backward pass on the cpu"):
        CASES[name][0](*tensors, backend="flex")


def test_attention_over_everything_is_left_to_the_flash_kernel(inputs: Callable[[str], Values]) -> None:
    q, k, v = (x.requires_grad_() for x in inputs("a window").values())
    for size in (None, LENGTH - 1, LENGTH, 100):
        ours, plain = (
            ops.sliding_window_attention(q, k, v, window_size=size, backend=backend) for backend in ("flex", "portable")
        )
        assert torch.equal(ours, plain)
        assert ours.requires_grad
    with pytest.raises(ValueError, match="no backward pass"):  # a window that hides one key is none of everything
        ops.sliding_window_attention(q, k, v, window_size=LENGTH - 2, backend="flex")
