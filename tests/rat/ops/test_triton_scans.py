"""The Triton kernels of both scans, in Triton's interpreter. What only a GPU shows is `make gpu-check`'s business."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from rat.ops import chunk_scan, gated_scan
from rat.ops.backend import HAS_TRITON, INTERPRETED
from rat.ops.documents import positions
from rat.ops.launch import Launch, record_launches

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from rat.ops.chunk_scan import triton as chunks
from rat.ops.gated_scan import triton as scans

Maker = Callable[..., dict[str, Tensor]]
IDS = torch.tensor([[0] * 3 + [1] * 5 + [2], [5] * 7 + [6] * 2])
OFFSET, LENGTHS = torch.tensor([0, 6]), torch.tensor([4, 9])
# name: (op, tokens in a row, whether it goes on from given states, options)
CASES: dict[str, tuple[Callable[..., object], int, bool, dict[str, object]]] = {
    "chunks": (chunk_scan, 9, False, {"chunk_size": 4}),
    "chunks of one token": (chunk_scan, 5, False, {"chunk_size": 1}),
    "several chunks a program": (chunk_scan, 11, False, {"chunk_size": 2}),
    "less than a chunk": (chunk_scan, 3, False, {"chunk_size": 5}),
    "long chunks": (chunk_scan, 9, False, {"chunk_size": 7}),
    "chunks, continued": (chunk_scan, 9, True, {"chunk_size": 4, "offset": OFFSET}),
    "chunks, documents": (chunk_scan, 9, False, {"chunk_size": 3, "document_ids": IDS}),
    "one decoded token": (chunk_scan, 1, True, {"chunk_size": 4, "offset": OFFSET}),
    "row": (gated_scan, 9, False, {}),
    "row, continued": (gated_scan, 9, True, {}),
    "row, continued, documents": (gated_scan, 9, True, {"document_ids": IDS}),
    "row, ragged": (gated_scan, 9, True, {"lengths": LENGTHS}),
    "chunks, ragged, continued, documents": (
        chunk_scan,
        9,
        True,
        {"chunk_size": 3, "document_ids": IDS, "lengths": LENGTHS, "offset": OFFSET},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several spans and several blocks of channels where a test has 9 tokens and 3 tiles of 2 channels."""
    monkeypatch.setattr(scans, "SPAN", 4)
    monkeypatch.setattr(scans, "SHORTEST_SPAN", 5)
    monkeypatch.setattr(scans, "CHANNELS", 4)
    monkeypatch.setattr(scans, "HAND_OVER_CHANNELS", 4)
    monkeypatch.setattr(scans, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(chunks, "LONGEST_WALK", 6)


@pytest.fixture
def _as_shipped(_small_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (scans.SPAN, chunks.LONGEST_WALK, scans.CHANNELS) == (64, 64, 1024)


@pytest.fixture
def inputs(scan_inputs: Maker) -> Callable[[str], dict[str, Tensor]]:
    return lambda name: scan_inputs(1, 2, CASES[name][1], CASES[name][2])


@pytest.fixture
def call(scanning: Callable[..., Callable[..., object]]) -> Callable[..., Callable[..., object]]:
    """call(name, backend): the case's op as a function of its tensors by name."""
    return lambda name, backend="triton": scanning(CASES[name][0], backend=backend, **CASES[name][3])


@pytest.fixture
def plain(scanning: Callable[..., Callable[..., object]], plain_scan: Callable[..., object]) -> Callable[..., object]:
    """plain(name): the case's scan as anyone would write it."""

    def make(name: str) -> Callable[..., object]:
        _, length, continued, options = CASES[name]
        place = positions(2, length, options.get("document_ids"), options.get("offset"), torch.device("cpu"))
        restart = place % options.get("chunk_size", 1000) == 0
        restart[:, 0] &= not continued or "offset" in options
        return scanning(plain_scan, restart=restart)

    return make


@every_case
def test_fp32_equals_the_reference(
    name: str,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    ours = differentiate(call(name), inputs(name), torch.float32)
    assert_same(ours, differentiate(call(name, "reference"), inputs(name)), 5e-6)


# Half of the error of bf16 is the interpreter's, which cuts numbers off where a GPU rounds them.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in CASES if "ragged" not in name), ("chunks", torch.bfloat16)],
)
def test_low_precision_is_no_worse_than_the_plain_formula(
    name: str,
    dtype: torch.dtype,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    plain: Callable[[str], object],
    differentiate: Maker,
    assert_no_worse: Callable[..., None],
) -> None:
    ours, theirs = (differentiate(op, inputs(name), dtype) for op in (call(name), plain(name)))
    assert_no_worse(ours, theirs, differentiate(call(name, "reference"), inputs(name)))
    assert [ours[f"output {i}"].dtype for i in range(4)] == [dtype] * 2 + [torch.float32] * 2


def test_gates_nearly_shut_lose_nothing_to_the_rounding_of_the_states(
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    plain: Callable[[str], object],
    differentiate: Maker,
) -> None:
    tensors = inputs("chunks")
    tensors["gate_bias"] -= 5  # s_t is y_t but for a hundredth
    ours, theirs = (differentiate(op, tensors, torch.float16) for op in (call("chunks"), plain("chunks")))
    for name, exact in differentiate(call("chunks", "reference"), tensors).items():
        error, allowed = ((x[name].double() - exact).abs().max() for x in (ours, theirs))
        assert error <= 1.25 * allowed, name
        assert error <= 2**-10 * exact.abs().max(), name


@pytest.mark.parametrize("op", [gated_scan, partial(chunk_scan, chunk_size=2)])
@pytest.mark.parametrize(
    ("width", "widths", "most_tiles"),
    [(7, (7,), 64), (6, (2,), 64), (6, (6, 6), 64), (6, (3, 3), 64), (6, (1, 2, 6), 64), (8, (1, 8, 2, 2), 4)],
)
def test_any_streams_agree(
    op: Callable[..., object],
    width: int,
    widths: tuple[int, ...],
    most_tiles: int,
    draw: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scans, "MOST_TILES", most_tiles)
    tensors = {f"y{i}": draw(i, 1, 5, w) for i, w in enumerate(widths)}
    tensors["gate_logits"] = draw(9, 1, 5, width)

    def run(backend: str) -> Callable[..., object]:
        return lambda gate_logits, **streams: op(gate_logits, list(streams.values()), backend=backend)

    assert_same(differentiate(run("triton"), tensors), differentiate(run("reference"), tensors), 1e-10)


@pytest.mark.usefixtures("_as_shipped")
def test_as_shipped_it_agrees_over_a_long_memory(
    draw: Callable[..., Tensor], differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    tensors = {"gate_logits": draw(0, 1, 70, 3) + 5, "y": draw(1, 1, 70, 3)}

    def run(backend: str) -> Callable[..., object]:
        return lambda gate_logits, y: chunk_scan(gate_logits, [y], chunk_size=65, backend=backend)

    assert_same(differentiate(run("triton"), tensors, torch.float32), differentiate(run("reference"), tensors))


@pytest.mark.parametrize("name", ["chunks", "row, continued, documents"])
def test_gates_that_are_open_or_shut_have_exact_gradients(
    name: str,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    tensors = inputs(name)
    tensors["gate_logits"] = tensors["gate_logits"].sign() * 200
    tensors["gate_bias"].zero_()
    ours = differentiate(call(name), tensors, torch.float32)
    assert_same(ours, differentiate(call(name, "reference"), tensors))


@pytest.mark.parametrize("name", [name for name in CASES if "ragged" in name])
def test_what_lies_past_a_rows_length_touches_nothing_even_nan(
    name: str, inputs: Callable[[str], dict[str, Tensor]], call: Callable[..., object], differentiate: Maker
) -> None:
    tensors = inputs(name)
    before = differentiate(call(name), tensors)
    for x in ("gate_logits", "v", "k"):
        tensors[x][0, LENGTHS[0] :] = torch.nan
        assert (before[f"gradient of {x}"][0, LENGTHS[0] :] == 0).all()
    assert all(torch.equal(x, before[value]) for value, x in differentiate(call(name), tensors).items())


@pytest.mark.parametrize("name", ["chunks", "less than a chunk", "row", "chunks, ragged, continued, documents"])
def test_memory_that_nothing_wrote_is_never_read(
    name: str,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    request: pytest.FixtureRequest,
) -> None:
    clean = differentiate(call(name), inputs(name), torch.float16)
    request.getfixturevalue("nan_memory")
    poisoned = differentiate(call(name), inputs(name), torch.float16)
    for value, expected in clean.items():
        assert torch.equal(poisoned[value], expected), value


def split(logits: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """As a layer gives them: parts of one projection."""
    z, q = torch.full_like(v, 7), torch.full_like(k, 7)
    parts = [z, v, logits, q, k]
    joined = torch.cat(parts, dim=-1).split([x.shape[-1] for x in parts], dim=-1)
    return joined[2], joined[1], joined[4]


def transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors)


def cropped(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x, torch.full_like(x, 7)], dim=1)[:, : x.shape[1]] for x in tensors)


def strided(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0] for x in tensors)


@pytest.mark.parametrize("name", ["chunks", "row, continued"])
@pytest.mark.parametrize("view", [split, transposed, cropped, strided])
def test_views_give_what_contiguous_tensors_give(
    name: str,
    view: Callable[..., tuple[Tensor, ...]],
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    def through_views(
        op: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
        gate_logits: Tensor,
        gate_bias: Tensor,
        v: Tensor,
        k: Tensor,
        **states: Tensor,
    ) -> object:
        gate_logits, v, k = view(gate_logits, v, k)
        assert not any(x.is_contiguous() for x in (gate_logits, v, k))
        outputs, finals = op(gate_logits, gate_bias, v, k, **states)
        return view(*outputs, outputs[0])[:2], strided(*finals)  # their gradients arrive as views

    ours, theirs = (differentiate(partial(through_views, call(name, b)), inputs(name)) for b in ("triton", "reference"))
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["chunks", "row, continued"])
def test_expanded_inputs_and_gradients_give_what_copies_give(
    name: str, inputs: Callable[[str], dict[str, Tensor]], call: Callable[..., Callable[..., object]]
) -> None:
    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = {x: (t if x == "gate_bias" else t[:1]).requires_grad_() for x, t in inputs(name).items()}
        rows = {x: t if x == "gate_bias" else t.expand(2, *t.shape[1:]) for x, t in leaves.items()}
        total = sum(out.sum() for out in tree_leaves(call(name, backend)(**rows)))  # expanded gradients
        return torch.autograd.grad(total, list(leaves.values()))

    torch.testing.assert_close(gradients("triton"), gradients("reference"))


@pytest.mark.parametrize(
    ("name", "wrap"), [("less than a chunk", "compiled"), ("row, continued", "compiled"), ("chunks", "checkpointed")]
)
def test_compiled_and_checkpointed_it_gives_the_same(
    name: str,
    wrap: str,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., Callable[..., object]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    torch._dynamo.reset()
    op = call(name)
    wrapped = {
        "compiled": torch.compile(op, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda **tensors: checkpoint(op, **tensors, use_reentrant=False),
    }[wrap]
    ours, eager = (differentiate(run, inputs(name), torch.float16) for run in (wrapped, op))
    assert {x: t.dtype for x, t in ours.items()} == {x: t.dtype for x, t in eager.items()}
    assert_same(ours, eager, 1e-3)


@pytest.mark.parametrize("name", ["chunks of one token", "one decoded token"])
def test_custom_ops_keep_torch_librarys_promises(
    name: str,
    inputs: Callable[[str], dict[str, Tensor]],
    call: Callable[..., object],
    differentiate: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def recording(op: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (calls.append((op, arguments)), op(*arguments))[1]

    for op in ("_scan_op", "_scan_backward_op"):
        monkeypatch.setattr(scans, op, recording(getattr(scans, op)))
    differentiate(call(name), inputs(name), torch.bfloat16)
    (forward, arguments), (backward, gradients) = calls
    detached = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), arguments)
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, detached, test_utils=every)
    torch.library.opcheck(backward, gradients, test_utils=("test_schema", "test_faketensor"))


@every_case
def test_the_backward_keeps_inputs_and_outputs_only(
    name: str, inputs: Callable[[str], dict[str, Tensor]], scanning: Callable[..., Callable[..., object]]
) -> None:
    op, _, _, options = CASES[name]
    leaves = {x: t.bfloat16().requires_grad_() for x, t in inputs(name).items() if not x.endswith("state")}
    states = {x: t.float().requires_grad_() for x, t in inputs(name).items() if x.endswith("state")}
    saved: list[Tensor] = []
    with record_launches((9, 0)), torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], id):
        options = {x: o for x, o in options.items() if x != "lengths"}
        outputs = tree_leaves(scanning(op, backend="triton", **options)(**leaves, **states))
    known = {x.untyped_storage().data_ptr() for x in chain(leaves.values(), outputs)}
    others = [x.shape for x in saved if x.untyped_storage().data_ptr() not in known and x.is_floating_point()]
    assert saved
    assert others == [(2, 2, 6)] * bool(states)  # the two initial states, side by side


def launches(length: int, width: int, narrow: int, **options: object) -> list[Launch]:
    """Those of a forward and backward pass in bf16 over parts of one projection."""
    widths = [width, narrow, width]
    joined = torch.empty(2, length, sum(widths), dtype=torch.bfloat16, requires_grad=True)
    v, k, logits = joined.split(widths, dim=-1)
    op = chunk_scan if "chunk_size" in options else gated_scan
    with record_launches((9, 0)) as recorded:
        outputs, _ = op(logits, (v, k), gate_bias=torch.empty(width, requires_grad=True), backend="triton", **options)
        torch.autograd.grad(outputs, joined, [torch.empty_like(out) for out in outputs])
    return recorded


@pytest.mark.usefixtures("_as_shipped")
@pytest.mark.parametrize("options", [{}, {"chunk_size": 16}, {"chunk_size": 100}])
def test_nothing_is_compiled_again_because_the_length_changed(options: dict[str, object]) -> None:
    short, long = launches(67, 32, 16, **options), launches(1000, 32, 16, **options)
    assert [x.kernel for x in short] == [x.kernel for x in long]
    for a, b in zip(short, long, strict=True):
        free = {"length", "spans"}  # the kernels declare them as such
        assert (a.constants, a.num_warps, a.num_stages) == (b.constants, b.num_warps, b.num_stages)
        assert {x: kind for x, kind in a.args.items() if x not in free} == {
            x: kind for x, kind in b.args.items() if x not in free
        }


@pytest.mark.usefixtures("_as_shipped")
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_chunks_move_the_fewest_bytes_but_for_a_tenth(chunk_size: int) -> None:
    length, width, narrow = 512, 2048, 256
    forward, backward = launches(length, width, narrow, chunk_size=chunk_size)
    states, others = 2 * 2 * length * width, 2 * 2 * length * narrow  # bytes of a bf16 tensor
    known = states * (chunk_size - 1) // chunk_size  # what no chunk begins with
    floors = {
        "forward": (2 * states + others, 2 * states),
        "backward": (2 * states + others + 2 * states + 2 * known, 2 * states + others),
    }
    for launch, (read, written) in zip((forward, backward), floors.values(), strict=True):
        assert read < launch.cost.bytes_read < 1.1 * read
        assert written < launch.cost.bytes_written < 1.1 * written


def test_offsets_are_64_bits_wide() -> None:
    # the last token begins 2^31 elements after the first; of its 4 GiB the system hands out only the touched pages
    apart = 2**30
    y = torch.empty(2 * apart + 4, dtype=torch.float16).as_strided((1, 3, 4), (3 * apart, apart, 1))
    y.copy_(torch.arange(12.0).view(1, 3, 4))
    (out,), _ = chunk_scan(torch.zeros(1, 3, 4), [y], chunk_size=2, backend="triton")
    assert out[0, 2].tolist() == [4, 4.5, 5, 5.5]
