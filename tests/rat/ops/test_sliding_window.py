from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.ops import sliding_window_attention
from rat.ops.sliding_window import portable

Differentiate = Callable[..., dict[str, Tensor]]
SHAPES = [*sorted({(w, t) for w in (1, 4, 16) for t in (1, w - 1, w, w + 1, w + 2, 3 * w + 5) if t >= 1}), (9, 9)]


def dense(q: Tensor, k: Tensor, v: Tensor, window_size: int, ids: Tensor | None = None) -> Tensor:
    """Softmax attention under a mask filled in one by one, every number in the dtype of q."""
    batch, length, heads, width = q.shape
    mask = torch.full((batch, length, length), -torch.inf)
    for b in range(batch):
        for t in range(length):
            for j in range(t, max(t - window_size, 0) - 1, -1):
                if ids is not None and ids[b, j] != ids[b, t]:
                    break
                mask[b, t, j] = 0
    rows = [
        torch.softmax(q[:, :, h] @ k[:, :, h].mT / width**0.5 + mask.to(q.dtype), dim=-1) @ v[:, :, h]
        for h in range(heads)
    ]
    return torch.stack(rows, dim=2)


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda seed, *shape: {name: draw(10 * seed + i, *shape) for i, name in enumerate("qkv")}


@pytest.fixture(params=["as shipped", "blocks of 2 rows"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as shipped":
        monkeypatch.setattr(portable, "FEWEST_ROWS", 2)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_window_of_w_holds_w_plus_one_keys(backend: str) -> None:
    v = torch.tensor([0.0, 3.0, 6.0, 9.0, 12.0, 15.0]).view(1, 6, 1, 1)
    q = torch.zeros_like(v)  # equal weights: a mean over what is seen
    means = sliding_window_attention(q, q, v, window_size=2, backend=backend)
    assert means.flatten().tolist() == pytest.approx([0, 1.5, 3, 6, 9, 12])
    ids = torch.tensor([[7, 7, 1, 1, 1, 7]])
    means = sliding_window_attention(q, q, v, window_size=1, document_ids=ids, backend=backend)
    assert means.flatten().tolist() == pytest.approx([0, 1.5, 6, 7.5, 10.5, 15])
    means = sliding_window_attention(q, q, v, window_size=None, backend=backend)
    assert means.flatten().tolist() == pytest.approx([0, 1.5, 3, 4.5, 6, 7.5])


@pytest.mark.parametrize(("window_size", "length"), SHAPES)
def test_reference_equals_a_dense_softmax(
    window_size: int,
    length: int,
    inputs: Callable[..., dict[str, Tensor]],
    ragged_ids: Callable[..., Tensor],
    differentiate: Differentiate,
    assert_same: Callable[..., None],
) -> None:
    values = inputs(0, 2, length, 2, 4)
    for ids in (None, ragged_ids(1, 2, length, 5)):

        def reference(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = ids) -> Tensor:
            return sliding_window_attention(q, k, v, window_size=window_size, document_ids=ids, backend="reference")

        expected = differentiate(lambda q, k, v, ids=ids: dense(q, k, v, window_size, ids), values)
        assert_same(differentiate(reference, values), expected, 1e-10)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window_size", "length"), [*SHAPES, (None, 1), (None, 23), (40, 7), (3, 150)])
def test_portable_equals_reference(
    window_size: int | None,
    length: int,
    documents: bool,
    inputs: Callable[..., dict[str, Tensor]],
    ragged_ids: Callable[..., Tensor],
    differentiate: Differentiate,
    assert_same: Callable[..., None],
) -> None:
    values = inputs(1, 2, length, 2, 4)
    options = {"window_size": window_size, "document_ids": ragged_ids(2, 2, length, 6) if documents else None}
    ours, theirs = (
        differentiate(lambda q, k, v, b=b: sliding_window_attention(q, k, v, backend=b, **options), values, dtype)
        for b, dtype in (("portable", torch.float32), ("reference", torch.float64))
    )
    assert_same(ours, theirs)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window_size", "length"), [(1, 8), (4, 17), (16, 53), (None, 21)])
def test_bf16_is_no_worse_than_the_plain_formula(
    window_size: int | None,
    length: int,
    documents: bool,
    inputs: Callable[..., dict[str, Tensor]],
    ragged_ids: Callable[..., Tensor],
    differentiate: Differentiate,
    assert_no_worse: Callable[..., None],
) -> None:
    values, ids = inputs(2, 2, length, 2, 16), ragged_ids(3, 2, length, 6) if documents else None

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: sliding_window_attention(
            q, k, v, window_size=window_size, document_ids=ids, backend=backend
        )

    plain = differentiate(lambda q, k, v: dense(q, k, v, window_size or length, ids), values, torch.bfloat16)
    ours = differentiate(op("portable"), values, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in ours.values())
    assert_no_worse(ours, plain, differentiate(op("reference"), values))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("window_size", [2, 5, None])
def test_packed_documents_equal_separate_ones(
    window_size: int | None,
    inputs: Callable[..., dict[str, Tensor]],
    differentiate: Differentiate,
    assert_same: Callable[..., None],
) -> None:
    values, parts = inputs(3, 2, 30, 2, 4), [[11, 1, 12, 6], [2, 14, 9, 5]]
    ids = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(p)) for p in parts])

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b, sizes in enumerate(parts):
            documents = zip(*(x[b : b + 1].split(sizes, dim=1) for x in (q, k, v)), strict=True)
            alone = [sliding_window_attention(*d, window_size=window_size, backend="portable") for d in documents]
            rows.append(torch.cat(alone, dim=1))
        return torch.cat(rows)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_window_attention(q, k, v, window_size=window_size, document_ids=ids, backend="portable")

    assert_same(*(differentiate(op, values, torch.float32) for op in (packed, separate)))


def test_extreme_logits_stay_finite(
    inputs: Callable[..., dict[str, Tensor]], differentiate: Differentiate, assert_same: Callable[..., None]
) -> None:
    values = inputs(4, 1, 20, 2, 4)
    values["q"] = values["q"].sign() * 100
    ours, theirs = (
        differentiate(lambda q, k, v, b=b: sliding_window_attention(q, k, v, window_size=3, backend=b), values, dtype)
        for b, dtype in (("portable", torch.float32), ("reference", torch.float64))
    )
    assert all(x.isfinite().all() for x in ours.values())
    assert_same(ours, theirs, 2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 5, 3, 4)},
            r"q, k and v must be .* alike .*\(2, 6, 3, 4\), \(2, 5, 3, 4\), \(2, 6, 3, 4\)",
        ),
        ({"v": torch.zeros(2, 6, 3, 8)}, r"q, k and v must be .* alike .*\(2, 6, 3, 8\)"),
        ({"q": torch.zeros(2, 6, 4)}, r"q, k and v must be .* alike .*got \(2, 6, 4\)"),
        (dict.fromkeys("qkv", torch.zeros(2, 0, 3, 4)), r"T >= 1, got \(2, 0, 3, 4\)"),
        ({"window_size": 0}, r"window_size must be at least 1, got 0"),
        ({"window_size": -3}, r"window_size must be at least 1, got -3"),
        ({"document_ids": torch.zeros(2, 5, dtype=torch.int64)}, r"document_ids must be integers of shape \(2, 6\)"),
        ({"document_ids": torch.zeros(2, 6)}, r"document_ids must be integers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = dict.fromkeys("qkv", torch.zeros(2, 6, 3, 4))
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**{**good, "window_size": 2, **change})
