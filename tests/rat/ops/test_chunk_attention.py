import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rat.ops import chunk_attention
from rat.ops.backend import why_not_native
from rat.ops.chunk_attention import native, portable

Maker = Callable[..., dict[str, Tensor]]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
fast_backends = pytest.mark.parametrize("backend", ["portable", NATIVE])
SHAPES = sorted({(size, t) for size in (1, 4, 16) for t in (1, size - 1, size, size + 1, 3 * size + 5) if t >= 1})
SHAPES += [(9, 9), (21, 21)]


@pytest.fixture(scope="module")
def inputs(draw: Callable[..., Tensor]) -> Maker:
    """Queries of 2 groups, keys and values of 6 heads: (h mod 2) and (h // 3) are different groups."""

    def make(seed: int, batch: int, length: int, groups: int = 2, heads: int = 6, width: int = 4) -> dict[str, Tensor]:
        shapes = {"q": groups, "k": heads, "v": heads}
        return {name: draw(10 * seed + i, batch, length, n, width) for i, (name, n) in enumerate(shapes.items())}

    return make


def cut_into_blocks(backend: str, logits: int, fewest: int, most: int, patch: pytest.MonkeyPatch) -> None:
    """Let a fast version take so many logits and rows together."""
    if backend == "native":  # counts the logits of one head, portable those of all
        patch.setattr(native, "BLOCK_BYTES", 4 * logits)
    else:
        patch.setattr(portable, "BLOCK_LOGITS", logits)
    patch.setattr(native if backend == "native" else portable, "FEWEST_ROWS", fewest)
    patch.setattr(native if backend == "native" else portable, "MOST_ROWS", most)


@pytest.fixture(params=["as shipped", "many blocks"])
def _blocks(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        cut_into_blocks(backend, 64, 3, 8, monkeypatch)


@every_backend
def test_without_preference_a_token_averages_itself_and_the_earlier_ends(backend: str) -> None:
    v = torch.tensor([1.0, 2, 4, 8, 16, 32, 64]).view(1, 7, 1, 1)
    zero = torch.zeros_like(v)
    attend = partial(chunk_attention, zero, zero, v, backend=backend)
    means = attend(chunk_size=2).flatten().tolist()
    assert means == pytest.approx([1, 2, 3, 5, 26 / 3, 42 / 3, 106 / 4])
    assert attend(chunk_size=7).flatten().tolist() == v.flatten().tolist()
    ids = torch.tensor([[3, 3, 3, 1, 1, 1, 1]])
    means = attend(chunk_size=2, document_ids=ids).flatten().tolist()
    assert means == pytest.approx([1, 2, 3, 8, 16, 24, 40])
    ends = (torch.zeros(1, 4, 1, 1), torch.tensor([100.0, 200, 300, 1e30]).view(1, 4, 1, 1))
    means = attend(chunk_size=2, offset=torch.tensor([5]), ends=ends)[:, :2].flatten().tolist()
    assert means == pytest.approx([301 / 3, 602 / 4])


@every_backend
def test_head_h_asks_with_group_h_mod_g(backend: str) -> None:
    # an end with key 30 and value 1, then a token with 0 and 0: group 1 wants that key, group 0 has no preference
    k = torch.tensor([30.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 1)
    q = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    out = chunk_attention(q, k, (k > 0).float(), chunk_size=1, backend=backend)
    assert out[0, 1].flatten().tolist() == pytest.approx([0.5, 1] * 3)


@every_backend
def test_positions_count_chunks_and_scale_is_one_over_root_d(backend: str) -> None:
    # d = 2 turns by one radian a chunk; the token in chunk 2 is 2, 1 and 0 chunks away from what it sees
    ones, v = torch.ones(1, 6, 1, 2), torch.arange(12.0).view(1, 6, 1, 2)
    out = chunk_attention(ones, ones, v, chunk_size=2, rope_base=10.0, backend=backend)
    weights = torch.tensor([math.exp(2 * math.cos(away) / 2**0.5) for away in (2, 1, 0)])
    expected = (weights[:, None] * v[0, [1, 3, 5], 0]).sum(0) / weights.sum()
    torch.testing.assert_close(out[0, 5, 0], expected)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_reference_equals_a_dense_softmax(
    chunk_size: int,
    length: int,
    rope_base: float | None,
    documents: bool,
    inputs: Maker,
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    dense_chunk_attention: Callable[..., Tensor],
    assert_same: Callable[..., None],
) -> None:
    ids = ragged_ids(length, 2, length, 9) if documents else None
    options = {"chunk_size": chunk_size, "rope_base": rope_base, "document_ids": ids}
    values = inputs(0, 2, length)
    reference = differentiate(partial(chunk_attention, backend="reference", **options), values)
    assert_same(reference, differentiate(partial(dense_chunk_attention, **options), values), 1e-10)


@pytest.mark.usefixtures("_blocks")
@fast_backends
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_the_fast_versions_equal_the_reference(
    chunk_size: int,
    length: int,
    rope_base: float | None,
    documents: bool,
    backend: str,
    inputs: Maker,
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    ids = ragged_ids(length + 1, 2, length, 9) if documents else None
    op = partial(chunk_attention, chunk_size=chunk_size, rope_base=rope_base, document_ids=ids)
    values = inputs(1, 2, length)
    ours = differentiate(partial(op, backend=backend), values, torch.float32)
    assert_same(ours, differentiate(partial(op, backend="reference"), values))


@fast_backends
@pytest.mark.parametrize("seed", range(12))
def test_any_sizes_agree(
    seed: int,
    backend: str,
    inputs: Maker,
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = random.Random(seed)
    batch, length, chunk_size, groups = (choose.randint(1, most) for most in (3, 50, 12, 3))
    cut_into_blocks(backend, choose.randint(1, 1000), choose.randint(1, 20), 20, monkeypatch)
    values = inputs(seed, batch, length, groups, groups * choose.randint(1, 4), 2 * choose.randint(1, 4))
    ids = choose.choice([None, ragged_ids(seed, batch, length, 7)])
    op = partial(chunk_attention, chunk_size=chunk_size, rope_base=choose.choice([None, 100.0]), document_ids=ids)
    ours = differentiate(partial(op, backend=backend), values, torch.float32)
    assert_same(ours, differentiate(partial(op, backend="reference"), values))


@pytest.mark.usefixtures("_blocks")
@fast_backends
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_bf16_is_no_worse_than_the_plain_formula(
    chunk_size: int,
    length: int,
    rope_base: float | None,
    documents: bool,
    backend: str,
    inputs: Maker,
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    dense_chunk_attention: Callable[..., Tensor],
) -> None:
    ids = ragged_ids(length + 2, 8, length, 9) if documents else None
    options = {"chunk_size": chunk_size, "rope_base": rope_base, "document_ids": ids}
    values = inputs(2, 8, length, width=16)
    ours = differentiate(partial(chunk_attention, backend=backend, **options), values, torch.bfloat16)
    plain, exact = (
        differentiate(partial(dense_chunk_attention, **options), values, dtype)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert all(x.dtype == torch.bfloat16 for x in ours.values())
    for name, value in exact.items():  # the mean, as the largest error of so few numbers is a matter of luck
        error, allowed = ((x[name].double() - value).square().mean().sqrt().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.2e} against {allowed:.2e} of plain PyTorch"


@pytest.mark.usefixtures("_blocks")
@fast_backends
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_packed_documents_equal_separate_ones(
    chunk_size: int,
    rope_base: float | None,
    backend: str,
    inputs: Maker,
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    values, parts = inputs(3, 2, 30), [[11, 1, 12, 6], [2, 14, 9, 5]]
    ids = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(p)) for p in parts])
    op = partial(chunk_attention, chunk_size=chunk_size, rope_base=rope_base, backend=backend)

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b, sizes in enumerate(parts):
            documents = zip(*(x[b : b + 1].split(sizes, dim=1) for x in (q, k, v)), strict=True)
            rows.append(torch.cat([op(*document) for document in documents], dim=1))
        return torch.cat(rows)

    packed = differentiate(partial(op, document_ids=ids), values, torch.float32)
    assert_same(packed, differentiate(separate, values, torch.float32))


@pytest.mark.usefixtures("_blocks")
@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size_have_finite_gradients(
    dtype: torch.dtype, backend: str, inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    values = inputs(4, 2, 23)
    values["q"] = values["q"].sign() * 64
    op = partial(chunk_attention, chunk_size=3, rope_base=20.0)
    ours = differentiate(partial(op, backend=backend), values, dtype)
    assert all(x.isfinite().all() for x in ours.values())
    if dtype == torch.float32:
        assert_same(ours, differentiate(partial(op, backend="reference"), values), 2e-3)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes, inside the custom ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        ops = [op for version in (portable, native) for op in (version._attend_op, version._backward_op)]
        self.bodies = {op._opoverload: op._init_fn for op in ops}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.bodies:
            with self:
                return self.bodies[func](*args)
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return made


@fast_backends
@pytest.mark.parametrize("documents", [False, True])
def test_no_tensor_has_an_entry_for_each_token_and_chunk(
    documents: bool, backend: str, inputs: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_blocks(backend, 1 << 14, 64, 512, monkeypatch)
    tokens, chunks = 2048, 1024
    q, k, v = (x.float().requires_grad_() for x in inputs(5, 1, tokens, 1, 1, 2).values())
    ids = torch.arange(tokens)[None] // 500 if documents else None
    with LargestTensor() as largest:
        chunk_attention(q, k, v, chunk_size=2, document_ids=ids, backend=backend).sum().backward()
    assert q.grad is not None
    assert 64 * chunks < largest.bytes < tokens * chunks // 4


OFFSET = torch.tensor([4, 9])
ENDS = (torch.zeros(2, 3, 6, 4),) * 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 4, 4)}, r"q must be \(2, 5, a divisor of 6, 4\), got \(2, 5, 4, 4\)"),
        ({"q": torch.zeros(2, 5, 0, 4)}, r"q must be \(2, 5, a divisor of 6, 4\), got \(2, 5, 0, 4\)"),
        ({"q": torch.zeros(2, 4, 2, 4)}, r"q must be .*got \(2, 4, 2, 4\)"),
        ({"q": torch.zeros(2, 5, 2, 8)}, r"q must be .*got \(2, 5, 2, 8\)"),
        ({"q": torch.zeros(2, 5, 8)}, r"q must be .*got \(2, 5, 8\)"),
        ({"k": torch.zeros(2, 5, 3, 4)}, r"k and v must be .*\(2, 5, 3, 4\) and \(2, 5, 6, 4\)"),
        ({"k": torch.zeros(2, 5, 4), "v": torch.zeros(2, 5, 4)}, r"k and v must be \(B, T, H, d\)"),
        (dict.fromkeys("qkv", torch.zeros(2, 0, 6, 4)), r"k and v must be .* T >= 1"),
        ({**dict.fromkeys("qkv", torch.zeros(2, 5, 6, 3)), "rope_base": 10.0}, "even head width, got 3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"offset": OFFSET}, "offset and ends go together"),
        ({"ends": ENDS}, "offset and ends go together"),
        ({"offset": OFFSET[:1], "ends": ENDS}, r"offset must be \(2,\), got \(1,\)"),
        ({"offset": OFFSET, "ends": (torch.zeros(2, 3, 2, 4), ENDS[1])}, r"the ends' keys must be .*\(2, 3, 2, 4\)"),
        ({"offset": OFFSET, "ends": (ENDS[0], torch.zeros(1, 3, 6, 4))}, r"the ends' values must be .*\(1, 3, 6, 4\)"),
        ({"offset": OFFSET, "ends": (ENDS[0], ENDS[1][:, :2])}, "as many end keys as end values, got 3 and 2"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"document_ids must be integers of shape \(2, 5\)"),
        ({"document_ids": torch.zeros(2, 5)}, "document_ids must be integers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, object], message: str, grad: bool) -> None:
    good = {"q": torch.zeros(2, 5, 2, 4), "k": torch.zeros(2, 5, 6, 4), "v": torch.zeros(2, 5, 6, 4), "chunk_size": 2}
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        chunk_attention(**{**good, **change})
