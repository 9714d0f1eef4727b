"""The Triton kernels of chunk attention in the interpreter. What only a GPU shows is `make gpu-check`'s business."""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from rat.ops import chunk_attention
from rat.ops.backend import HAS_TRITON, INTERPRETED
from rat.ops.launch import Launch, record_launches

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from rat.ops.chunk_attention import call, tiles, triton

Maker = Callable[..., dict[str, Tensor]]
OFFSET = torch.tensor([5, 12])
CONTINUED_IDS = torch.tensor([[0] * 9 + [1] * 12, [7] * 2 + [6] * 19])


class Case(NamedTuple):
    """One call: sizes of its tensors, and what else it is given."""

    chunk_size: int
    length: int
    rope_base: float | None = 20.0
    documents: float | None = None  # mean length
    ends: int | None = None  # given ones; rows then stand at OFFSET
    batch: int = 1
    groups: int = 1
    heads: int = 2
    width: int = 16

    def options(self, ragged_ids: Callable[..., Tensor]) -> dict[str, object]:
        ids = None if self.documents is None else ragged_ids(3, self.batch, self.length, self.documents)
        if ids is not None and self.ends is not None:
            ids = CONTINUED_IDS
        offset = None if self.ends is None else OFFSET
        return {"chunk_size": self.chunk_size, "rope_base": self.rope_base, "document_ids": ids, "offset": offset}


# Tiles of 16 tokens and 16 ends: lengths reach over several of both, with and without a mask, and leave a tail.
CASES = {
    "chunks": Case(4, 39, batch=2, groups=2, heads=4),
    "no positions": Case(3, 40, rope_base=None, groups=2, heads=4),
    "chunks of one token": Case(1, 37),
    "full tiles of ends": Case(2, 71, heads=1),
    "whole tiles": Case(4, 64, heads=1),
    "longer chunks than tiles": Case(20, 50),
    "one chunk": Case(9, 9),
    "less than a chunk": Case(50, 7),
    "one token": Case(1, 1),
    "a group for each head": Case(2, 20, groups=3, heads=3),
    "wide heads": Case(4, 22, width=32, heads=1),
    "padded heads": Case(2, 21, width=20),
    "odd heads": Case(2, 21, rope_base=None, width=5),
    "documents": Case(3, 40, documents=9, batch=2),
    "documents, chunks of one token": Case(1, 40, documents=11),
    "documents, no positions": Case(4, 29, rope_base=None, documents=20, groups=2, heads=4),
    "continued": Case(4, 21, ends=9, batch=2),
    "continued, chunks of one token": Case(1, 7, ends=40, batch=2, heads=1),
    "continued, documents": Case(3, 21, ends=8, documents=1, batch=2),
    "continued, no ends": Case(20, 3, ends=0, batch=2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FEW = {"chunks": Case(4, 19), "continued, documents": CASES["continued, documents"]._replace(heads=1)}
some_cases = pytest.mark.parametrize("case", FEW.values(), ids=FEW)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward_tiles", "query_tiles", "end_tiles"):
        monkeypatch.setattr(tiles, name, lambda *_: tiles.Tiles(16, 16, 4))
    monkeypatch.setattr(call, "PLAIN_TILE", 16 * 16)
    monkeypatch.setattr(triton, "PROGRAMS", 16)
    monkeypatch.setattr(triton, "SHORTEST_SHARE", 10)


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Maker:
    def make(case: Case) -> dict[str, Tensor]:
        sizes = case.batch, case.length
        shapes = {
            name: (*sizes, heads, case.width)
            for name, heads in {"q": case.groups, "k": case.heads, "v": case.heads}.items()
        }
        if case.ends is not None:
            shapes |= dict.fromkeys(("end_keys", "end_values"), (case.batch, case.ends, case.heads, case.width))
        return {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    return make


@pytest.fixture
def op(ragged_ids: Callable[..., Tensor]) -> Callable[..., Callable[..., Tensor]]:
    """op(case, backend): the case's call as a function of its tensors."""

    def bind(case: Case, backend: str = "triton") -> Callable[..., Tensor]:
        run = partial(chunk_attention, backend=backend, **case.options(ragged_ids))

        def call(q: Tensor, k: Tensor, v: Tensor, *ends: Tensor, **named: Tensor) -> Tensor:
            return run(q, k, v, ends=(*ends, *named.values()) or None)

        return call

    return bind


@every_case
def test_fp32_equals_the_reference(
    case: Case, op: Callable[..., object], inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    ours = differentiate(op(case), inputs(case), torch.float32)
    assert_same(ours, differentiate(op(case, "reference"), inputs(case)), 5e-6)


@every_case
def test_fp16_is_no_worse_than_plain_pytorch(
    case: Case,
    op: Callable[..., object],
    inputs: Maker,
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    dense_chunk_attention: Callable[..., Tensor],
) -> None:
    plain_op = op(case, "portable")
    if case.ends is None:
        options = case.options(ragged_ids)
        del options["offset"]
        plain_op = partial(dense_chunk_attention, **options)
    ours, plain = (differentiate(x, inputs(case), torch.float16) for x in (op(case), plain_op))
    for name, exact in differentiate(op(case, "reference"), inputs(case)).items():
        error, allowed = ((x[name].double() - exact).abs() for x in (ours, plain))
        assert ours[name].dtype == torch.float16
        if error.numel():
            # nobody rounds better than to half of a last place
            assert error.max() <= 2 * allowed.max() + exact.abs().max() * 2**-11, name
            assert error.mean() <= 1.2 * allowed.mean() + exact.abs().mean() * 2**-13, name


@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_agree(
    seed: int, op: Callable[..., object], inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    choose = random.Random(seed)
    length, groups = choose.randint(1, 50), choose.randint(1, 2)
    case = Case(
        choose.randint(1, 12),
        length,
        choose.choice([None, 100.0]),
        choose.choice([None, 7]),
        groups=groups,
        heads=groups * choose.randint(1, 2),
        width=2 * choose.randint(1, 12),
    )
    ours = differentiate(op(case), inputs(case), torch.float32)
    assert_same(ours, differentiate(op(case, "reference"), inputs(case)), 5e-6)


@some_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_that_nothing_wrote_is_never_read(
    case: Case,
    dtype: torch.dtype,
    op: Callable[..., object],
    inputs: Maker,
    differentiate: Maker,
    request: pytest.FixtureRequest,
) -> None:
    clean = differentiate(op(case), inputs(case), dtype)
    request.getfixturevalue("nan_memory")
    poisoned = differentiate(op(case), inputs(case), dtype)
    for value, expected in clean.items():
        assert torch.equal(poisoned[value], expected), value


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    """As a layer hands q on: heads side by side in rows that hold more than them."""
    return torch.cat([x, x + 7], dim=2)[:, :, : x.shape[2]]


def head_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@some_cases
@pytest.mark.parametrize("view", [transposed, sliced, head_major])
def test_views_give_what_contiguous_tensors_give(
    case: Case,
    view: Callable[[Tensor], Tensor],
    op: Callable[..., object],
    inputs: Maker,
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    call = op(case)

    def through_views(**leaves: Tensor) -> Tensor:
        return view(call(*(view(x) for x in leaves.values())))  # so that its gradient is a view as well

    assert_same(
        differentiate(through_views, inputs(case), torch.float32), differentiate(call, inputs(case), torch.float32), 0
    )


def test_an_expanded_gradient_is_read_as_it_is(op: Callable[..., object], inputs: Maker) -> None:
    case = FEW["chunks"]

    def gradients(weight: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.float().requires_grad_() for x in inputs(case).values()]
        return torch.autograd.grad(op(case)(*leaves), leaves, weight)

    weight = torch.arange(16.0).expand(1, case.length, case.heads, 16)
    for ours, expected in zip(gradients(weight), gradients(weight.contiguous()), strict=True):
        assert torch.equal(ours, expected)


@some_cases
def test_a_compiled_graph_gives_the_same(
    case: Case, op: Callable[..., object], inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op(case), fullgraph=True, backend="aot_eager")
    ours = differentiate(lambda **x: compiled(*x.values()), inputs(case), torch.float32)
    assert_same(ours, differentiate(op(case), inputs(case), torch.float32), 1e-6)


@some_cases
def test_activation_checkpointing_gives_the_same(
    case: Case, op: Callable[..., object], inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    def again(**leaves: Tensor) -> Tensor:
        return checkpoint(op(case), *leaves.values(), use_reentrant=False)

    ours = differentiate(again, inputs(case), torch.float32)
    assert_same(ours, differentiate(op(case), inputs(case), torch.float32), 0)


@some_cases
def test_custom_ops_keep_torch_librarys_promises(
    case: Case, op: Callable[..., object], inputs: Maker, differentiate: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("_forward_op", "_backward_op"):
        custom = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, _op=custom: (calls.append((_op, a)), _op(*a))[1])
    differentiate(op(case), inputs(case), torch.float32)
    (forward, arguments), (backward, gradients) = calls
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    detached = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), arguments)
    torch.library.opcheck(forward, detached, test_utils=every)
    torch.library.opcheck(backward, gradients, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["chunks", "continued"])
def test_the_backward_keeps_inputs_output_and_log_sum_exp(name: str, op: Callable[..., object], inputs: Maker) -> None:
    case = CASES[name]
    leaves = [x.half().requires_grad_() for x in inputs(case).values()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = op(case)(*leaves)
    known = {x.untyped_storage().data_ptr() for x in (*leaves, out)}
    others = [x for x in saved if x.untyped_storage().data_ptr() not in known and x.is_floating_point()]
    assert [x.shape for x in others] == [(case.batch, case.heads, case.length)]


def recorded(length: int, documents: bool) -> list[Launch]:
    q, k, v = (torch.empty(1, length, n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (1, 2, 2))
    ids = torch.zeros(1, length, dtype=torch.int64) if documents else None
    with record_launches((9, 0)) as launches:
        out = chunk_attention(q, k, v, chunk_size=4, rope_base=10.0, document_ids=ids, backend="triton")
        out.sum().backward()
    return launches


@pytest.mark.parametrize("documents", [False, True])
def test_no_length_makes_a_kernel_compile_again(documents: bool) -> None:
    def compiled_for(length: int) -> dict[str, object]:
        found = {}
        for launch in recorded(length, documents):
            kernel = launch.kernel
            numbers = {name for name, value in launch.args.items() if isinstance(value, int)}
            assert numbers <= set(kernel.kwargs["do_not_specialize"]), kernel.__name__
            kinds = {name: type(value) if name in numbers else value for name, value in launch.args.items()}
            kinds |= {name: float for name, value in kinds.items() if isinstance(value, float)}
            found[kernel.__name__] = kinds, launch.constants, launch.num_warps, launch.num_stages, launch.unaligned
        return found

    expected = compiled_for(4096)
    assert len(expected) == 5 + (not documents)
    for length in (4, 7, 16, 2049):
        assert compiled_for(length) == expected


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 40])
@pytest.mark.parametrize("length", [1, 15, 16, 64, 203])
def test_counted_bytes_and_products_are_those_of_the_loops(length: int, chunk_size: int) -> None:
    sizes = tiles.Tiles(16, 8, 4)
    last = [(min(length, start + 16) - 1) // chunk_size for start in range(0, length, 16)]
    assert tiles.ends_read(length, chunk_size, sizes) == (sum(last), sum(-(-x // 8) * 8 * 16 for x in last))
    tokens = (length - (end + 1) * chunk_size for end in range(0, length // chunk_size, 8))
    assert tiles.tokens_read(length, chunk_size, sizes) == sum(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.fromkeys("qkv", torch.zeros(1, 5, 2, 4).double()), "one dtype of bf16, fp16 and fp32, got torch.float64"),
        ({"k": torch.zeros(1, 5, 2, 4).half()}, "one dtype .*got torch.float16, torch.float32"),
        (dict.fromkeys("qkv", torch.zeros(1, 5, 2, 257)), "heads of at most 256 channels, got 257"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(change: dict[str, Tensor], message: str) -> None:
    good = dict.fromkeys("qkv", torch.zeros(1, 5, 2, 4))
    with pytest.raises(ValueError, match=message):
        chunk_attention(**{**good, **change}, chunk_size=2, backend="triton")
