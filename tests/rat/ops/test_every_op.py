"""What holds for every operation alike, in each of the situations that `CASES` lists."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from rat import ops
from rat.ops.backend import why_not_native
from rat.ops.chunk_attention import native as attention_native
from rat.ops.chunk_attention import portable as attention_portable
from rat.ops.chunk_scan import portable as chunk_portable
from rat.ops.gated_scan import native as scan_native
from rat.ops.gated_scan import portable as scan_portable
from rat.ops.linear import native as linear_native
from rat.ops.output_gate import native as gate_native
from rat.ops.sliding_window import portable as window_portable

Maker = Callable[..., dict[str, Tensor]]
LENGTH = 11
SCAN = {"gate_logits": (2, LENGTH, 4), "gate_bias": (4,), "v": (2, LENGTH, 4), "k": (2, LENGTH, 2)}
STATES = {"v_state": (2, 4), "k_state": (2, 4)}
ATTENTION = {"q": (2, LENGTH, 2, 4), "k": (2, LENGTH, 4, 4), "v": (2, LENGTH, 4, 4)}
ENDS = {"end_keys": (2, 5, 4, 4), "end_values": (2, 5, 4, 4)}
ALIKE = {name: (2, LENGTH, 2, 4) for name in "qkv"}
GATED = {"gate_logits": (2, LENGTH, 4), "x": (2, LENGTH, 4)}
IDS = torch.tensor([[0] * 4 + [1] * 6 + [2], [5] * 8 + [6] * 3])
PAST = {"offset": torch.tensor([0, 2]), "document_ids": IDS}


def scanned(op: Callable[..., object], *tensors: Tensor, **options: object) -> object:
    logits, bias, v, k, *states = tensors
    return op(logits, (v, k), gate_bias=bias, initial_state=states or None, **options)


def attended(q: Tensor, k: Tensor, v: Tensor, *ends: Tensor, **options: object) -> Tensor:
    return ops.chunk_attention(q, k, v, ends=ends or None, **options)


gated, chunked = partial(scanned, ops.gated_scan), partial(scanned, ops.chunk_scan)
Case = tuple[Callable[..., object], dict[str, tuple[int, ...]]]
CASES: dict[str, Case] = {
    "gated scan": (gated, SCAN),
    "gated scan, continued, documents": (partial(gated, document_ids=IDS), SCAN | STATES),
    "gated scan, ragged": (partial(gated, lengths=torch.tensor([5, 11])), SCAN | STATES),
    "chunk scan": (partial(chunked, chunk_size=4), SCAN),
    "chunk scan, long chunks": (partial(chunked, chunk_size=9), SCAN),
    "chunk scan, continued, documents": (partial(chunked, chunk_size=4, **PAST), SCAN | STATES),
    "chunk attention": (partial(attended, chunk_size=3), ATTENTION),
    "chunk attention, rotary": (partial(attended, chunk_size=2, rope_base=9.0), ATTENTION),
    "chunk attention, documents": (partial(attended, chunk_size=3, document_ids=IDS), ATTENTION),
    "chunk attention, continued": (partial(attended, chunk_size=3, rope_base=9.0, **PAST), ATTENTION | ENDS),
    "linear": (ops.linear, {"x": (2, LENGTH, 4), "weight": (6, 4)}),
    "output gate": (ops.output_gate, GATED),
    "rotary": (lambda x, **options: ops.rotary(x, torch.arange(LENGTH), **options), {"x": (2, LENGTH, 3, 4)}),
    "sliding window": (partial(ops.sliding_window_attention, window_size=2), ALIKE),
    "sliding window, documents": (partial(ops.sliding_window_attention, window_size=2, document_ids=IDS), ALIKE),
    "whole attention": (partial(ops.sliding_window_attention, window_size=None), ALIKE),
}
CUSTOM_OPS = (
    (scan_portable, "_scan_op"),
    (scan_portable, "_scan_backward_op"),
    (attention_portable, "_attend_op"),
    (attention_portable, "_backward_op"),
    (scan_native, "_scan_op"),
    (scan_native, "_scan_backward_op"),
    (attention_native, "_attend_op"),
    (attention_native, "_backward_op"),
    (gate_native, "_gate_op"),
    (gate_native, "_backward_op"),
)
NATIVE_CASES = [name for name in CASES if "scan" in name or "chunk" in name or name in ("output gate", "linear")]
CUSTOM_CASES = [name for name in NATIVE_CASES if "scan" in name or "chunk" in name]
KEEPING_LITTLE = [name for name in NATIVE_CASES if name != "chunk attention, continued"]  # given ends are inputs too
COMPILED = ["gated scan", "chunk scan, continued, documents", "chunk attention, rotary", "chunk attention, continued"]
no_compiler = pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++ compiler")


def in_both(portable: Sequence[str], native: Sequence[str]) -> pytest.MarkDecorator:
    """Run a test with the portable version of these cases, and with the native version of those."""
    cases = [pytest.param(name, "native", marks=no_compiler) for name in native]
    return pytest.mark.parametrize(("name", "backend"), [*((name, "portable") for name in portable), *cases])


every_case = pytest.mark.parametrize("name", CASES)
every_fast_case = in_both(list(CASES), NATIVE_CASES)
# only native computes in fp32 whatever it is given
WIDEST = {"portable": torch.float64, "native": torch.float32}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and slabs in 11 tokens, with a rest that fills no block."""
    for module, sizes in {
        scan_portable: {"BLOCK": 3, "SLAB": 2 * 2 * 3 * 4},
        chunk_portable: {"LONGEST_WALK": 8},
        attention_portable: {"BLOCK_LOGITS": 64, "FEWEST_ROWS": 2, "MOST_ROWS": 4},
        attention_native: {"BLOCK_BYTES": 64, "FEWEST_ROWS": 2, "MOST_ROWS": 4},
        window_portable: {"FEWEST_ROWS": 2},
        linear_native: {"FEWEST_WEIGHTS": 1},
    }.items():
        for size, number in sizes.items():
            monkeypatch.setattr(module, size, number)


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Callable[[str], dict[str, Tensor]]:
    return lambda name: {x: draw(i, *shape) for i, (x, shape) in enumerate(CASES[name][1].items())}


@pytest.fixture
def call() -> Callable[..., Callable[..., object]]:
    """call(name, backend): the case's op as a function of its tensors by name."""

    def make(name: str, backend: ops.Backend) -> Callable[..., object]:
        op = partial(CASES[name][0], backend=backend)
        return lambda **tensors: op(*tensors.values())

    return make


@every_case
@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_gradients_are_those_of_finite_differences(
    name: str, backend: ops.Backend, inputs: Callable[[str], dict[str, Tensor]]
) -> None:
    tensors = [x.requires_grad_() for x in inputs(name).values()]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(CASES[name][0](*tensors, backend=backend)))

    assert torch.autograd.gradcheck(flat, tensors, fast_mode=True)


@every_fast_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_nothing_wrote_is_never_read(
    name: str,
    backend: ops.Backend,
    dtype: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    request: pytest.FixtureRequest,
) -> None:
    clean = differentiate(call(name, backend), inputs(name), dtype)
    request.getfixturevalue("nan_memory")
    poisoned = differentiate(call(name, backend), inputs(name), dtype)
    for value, expected in clean.items():
        assert torch.equal(poisoned[value], expected), value


def test_the_buffers_of_a_custom_op_are_poisoned_too(
    nan_memory: None, monkeypatch: pytest.MonkeyPatch, draw: Callable[..., Tensor]
) -> None:
    # an op that forgets to write its output must be seen by the test above
    monkeypatch.setattr(scan_portable, "_advance", lambda grid, states, outputs: states)
    (out,), _ = ops.gated_scan(draw(0, 1, 5, 2), [draw(1, 1, 5, 2)], backend="portable")
    assert out.isnan().all()
    monkeypatch.setattr(attention_portable._Call, "blocks", lambda self: iter(()))
    out = ops.chunk_attention(*(draw(i, 1, 5, 2, 2) for i in range(3)), chunk_size=2, backend="portable")
    assert out.isnan().all()


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x[..., :1] - 7, x, x], dim=-1)[..., 1 : 1 + x.shape[-1]]


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]


@every_fast_case
@pytest.mark.parametrize("view", [transposed, sliced, strided])
def test_views_give_what_contiguous_tensors_give(
    name: str,
    backend: ops.Backend,
    view: Callable[[Tensor], Tensor],
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    op, tensors, dtype = call(name, backend), inputs(name), WIDEST[backend]
    assert not view(next(iter(tensors.values()))).is_contiguous()

    def through_views(**leaves: Tensor) -> object:
        outputs = op(**{x: view(leaf) for x, leaf in leaves.items()})
        for out in tree_leaves(outputs):
            out.register_hook(lambda grad: arrived.append(grad.is_contiguous()))
        return tree_map(strided, outputs)

    arrived: list[bool] = []
    tolerance = 8 * torch.finfo(dtype).eps
    assert_same(differentiate(through_views, tensors, dtype), differentiate(op, tensors, dtype), tolerance)
    assert arrived
    assert not any(arrived)


@every_fast_case
def test_expanded_inputs_and_gradients_give_what_copies_give(
    name: str,
    backend: ops.Backend,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
) -> None:
    def gradients(materialize: bool) -> Sequence[Tensor]:
        tensors = {x: t.to(WIDEST[backend]) for x, t in inputs(name).items()}
        leaves = {x: (t if x == "gate_bias" else t[:1]).requires_grad_() for x, t in tensors.items()}
        rows = {x: t if x == "gate_bias" else t.expand(2, *t.shape[1:]) for x, t in leaves.items()}
        outputs = call(name, backend)(**{x: t.contiguous() if materialize else t for x, t in rows.items()})
        total = sum(out.sum() for out in tree_leaves(outputs))  # an expanded gradient
        return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(False), gradients(True))


@every_fast_case
def test_inputs_are_left_as_they_were(
    name: str,
    backend: ops.Backend,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
) -> None:
    leaves = {x: t.float().requires_grad_() for x, t in inputs(name).items()}
    outputs = tree_leaves(call(name, backend)(**leaves))
    sum(out.square().sum() for out in outputs).backward()
    for x, t in inputs(name).items():
        assert torch.equal(leaves[x].detach().double(), t)


@no_compiler
@pytest.mark.parametrize("name", NATIVE_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_the_cpu_kernels_do_not_take_is_portables(
    name: str,
    dtype: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
) -> None:
    ours, portable = (differentiate(call(name, backend), inputs(name), dtype) for backend in ("native", "portable"))
    assert all(torch.equal(x, portable[value]) for value, x in ours.items())


@no_compiler
@pytest.mark.parametrize("name", NATIVE_CASES)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(
    name: str,
    default: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
) -> None:
    # as in a training whose precision is bf16-true
    expected = differentiate(call(name, "native"), inputs(name), torch.float32)
    torch.set_default_dtype(default)
    try:
        ours = differentiate(call(name, "native"), inputs(name), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, expected[value]) for value, x in ours.items())


@in_both(list(CASES), [*COMPILED, "output gate"])
def test_a_compiled_graph_gives_the_same(
    name: str,
    backend: ops.Backend,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CASES[name][0], fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        ours = differentiate(lambda **tensors: compiled(*tensors.values(), backend=backend), inputs(name), dtype)
        eager = differentiate(call(name, backend), inputs(name), dtype)
        assert {x: t.dtype for x, t in ours.items()} == {x: t.dtype for x, t in eager.items()}
        assert_same(ours, eager, 1e-6 if dtype == torch.float32 else 2**-6)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, tuple[object, ...]]]:
    """The calls of custom ops, forward and backward: (op, arguments)."""
    calls: list[tuple[object, tuple[object, ...]]] = []

    def recording(op: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            calls.append((op, arguments))
            return op(*arguments)

        return run

    for module, name in CUSTOM_OPS:
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    return calls


@in_both(CUSTOM_CASES, [*CUSTOM_CASES, "output gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_ops_keep_torch_librarys_promises(
    name: str,
    backend: ops.Backend,
    dtype: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    recorded: list[tuple[Callable[..., object], tuple[object, ...]]],
) -> None:
    differentiate(call(name, backend), inputs(name), dtype)
    (forward, arguments), (backward, gradients) = recorded
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    detached = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), arguments)
    torch.library.opcheck(forward, detached, test_utils=every)
    torch.library.opcheck(backward, gradients, test_utils=("test_schema", "test_faketensor"))


@in_both([*KEEPING_LITTLE, "rotary"], KEEPING_LITTLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_inputs_outputs_and_little_else(
    name: str,
    backend: ops.Backend,
    dtype: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
) -> None:
    leaves = {x: t.to(dtype).requires_grad_() for x, t in inputs(name).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        outputs = tree_leaves(call(name, backend)(**leaves))
    known = {x.untyped_storage().data_ptr() for x in (*leaves.values(), *outputs)}
    others = [x.shape for x in saved if x.untyped_storage().data_ptr() not in known and x.is_floating_point()]
    # chunk ends and angles are fewer numbers than any input has; weights or turned queries are not
    smallest = min(x.numel() for x in leaves.values() if x.ndim > 2)
    assert saved
    assert all(shape.numel() < smallest for shape in others), others
