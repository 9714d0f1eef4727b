import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat.ops import gated_scan
from rat.ops.backend import why_not_native
from rat.ops.gated_scan import portable

Maker = Callable[..., dict[str, Tensor]]
LENGTHS = [1, 3, 4, 5, 17, 31, 32, 33, 101]
SITUATIONS = ["zero state", "given state", "ragged rows", "documents", "ragged documents"]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
# what each is held to: only native computes in fp32 whatever it is given
PRECISION = {"reference": (torch.float64, 1e-10), "portable": (torch.float64, 1e-10), "native": (torch.float32, 1e-5)}


@pytest.fixture(
    params=[
        "portable",
        "portable, blocks of 4 tokens in slabs of 1",
        "portable, blocks of 5 tokens in slabs of 3",
        NATIVE,
    ]
)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fast version: its tokens in a block, and how many of these blocks (of 2 rows, 6 channels) stand in a slab."""
    backend, *sizes = request.param.split(", ")
    if sizes:
        block, slab = (4, 1) if "slabs of 1" in request.param else (5, 3)
        monkeypatch.setattr(portable, "BLOCK", block)
        monkeypatch.setattr(portable, "SLAB", slab * block * 2 * 6)
    return backend


@pytest.fixture
def options(ragged_ids: Callable[..., Tensor]) -> Callable[[str, int], dict[str, Tensor]]:
    """The options of a situation, for 2 rows of some length."""

    def make(situation: str, length: int) -> dict[str, Tensor]:
        lengths = {"lengths": torch.tensor([length // 2, length])} if "ragged" in situation else {}
        ids = {"document_ids": ragged_ids(length, 2, length, 6)} if "documents" in situation else {}
        return lengths | ids

    return make


@every_backend
def test_hand_made_numbers(backend: str) -> None:
    half, certain = torch.zeros(1, 3, 1), torch.tensor([[[40.0], [-40.0], [40.0]]])
    y = torch.tensor([[[1.0], [2.0], [4.0]]])
    (out,), (last,) = gated_scan(half, [y], backend=backend)
    assert out.flatten().tolist() == [0.5, 1.25, 2.625]
    assert last.tolist() == [[2.625]]
    (out,), _ = gated_scan(half, [y], initial_state=[torch.tensor([[8.0]])], backend=backend)
    assert out.flatten().tolist() == [4.5, 3.25, 3.625]
    (out,), _ = gated_scan(certain, [y], initial_state=[torch.tensor([[8.0]])], backend=backend)
    assert out.flatten().tolist() == pytest.approx([8, 2, 2])
    (out,), _ = gated_scan(half, [y], gate_bias=torch.tensor([3.0]).log(), backend=backend)  # gate 3/4
    assert out.flatten().tolist() == pytest.approx([0.25, 0.6875, 1.515625])


@every_backend
def test_a_narrow_stream_is_tiled_over_the_gate(backend: str) -> None:
    y = torch.tensor([[[1.0, 10.0]]])
    (out,), _ = gated_scan(torch.zeros(1, 1, 6), [y], backend=backend)
    assert out.flatten().tolist() == [0.5, 5, 0.5, 5, 0.5, 5]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [1, 5, 33])
def test_reference_equals_a_dense_matrix(
    length: int,
    situation: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    dense_scan: Callable[..., object],
    options: Callable[[str, int], dict[str, Tensor]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs, given_options = scan_inputs(0, 2, length, situation != "zero state"), options(situation, length)
    ids = given_options.get("document_ids", torch.zeros(2, length, dtype=torch.int64))
    restart = ids.diff(dim=1, prepend=ids[:, :1]) != 0
    dense = scanning(dense_scan, restart=restart, **{k: x for k, x in given_options.items() if k == "lengths"})
    reference = scanning(gated_scan, backend="reference", **given_options)
    assert_same(differentiate(reference, inputs), differentiate(dense, inputs), 1e-9)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_fast_versions_equal_the_reference(
    length: int,
    situation: str,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    options: Callable[[str, int], dict[str, Tensor]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs, given_options = scan_inputs(1, 2, length, situation != "zero state"), options(situation, length)
    ours, theirs = (
        differentiate(scanning(gated_scan, backend=backend, **given_options), inputs, dtype)
        for backend, dtype in ((fast, torch.float32), ("reference", torch.float64))
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("several_widths", [True, False])
def test_any_sizes_agree(
    seed: int,
    several_widths: bool,
    fast: str,
    draw: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    choose = random.Random(seed)
    batch, length, narrow = choose.randint(1, 4), choose.randint(1, 80), choose.randint(1, 3)
    width, middle = narrow * choose.choice([2, 6]), narrow * 2
    inputs = {"gate_logits": draw(seed, batch, length, width)}
    widths = {"a": narrow, "b": middle if several_widths else narrow, "c": width, "d": width}
    inputs |= {name: draw(seed + i, batch, length, w) for i, (name, w) in enumerate(widths.items())}

    def scan(gate_logits: Tensor, backend: str, **streams: Tensor) -> object:
        return gated_scan(gate_logits, list(streams.values()), backend=backend)

    ours = differentiate(partial(scan, backend=fast), inputs, torch.float32)
    assert_same(ours, differentiate(partial(scan, backend="reference"), inputs))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", [NATIVE])
def test_threads_that_share_the_columns_of_a_row_agree(
    backend: str,
    threads: int,
    scanning: Callable[..., object],
    draw: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # two threads take the columns 0 to 63 and 64 to 79 of both tiles of 80
    monkeypatch.setattr("rat.ops.native.threads", lambda work: threads)
    shapes = {"gate_logits": (1, 9, 160), "gate_bias": (160,), "v": (1, 9, 160), "k": (1, 9, 80)}
    shapes |= {"v_state": (1, 160), "k_state": (1, 160)}
    inputs = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    ours, theirs = (
        scanning(gated_scan, document_ids=torch.arange(9)[None] // 5, backend=b) for b in (backend, "reference")
    )
    assert_same(differentiate(ours, inputs, torch.float32), differentiate(theirs, inputs))


@pytest.mark.parametrize("length", [5, 33, 101])
def test_bf16_is_no_worse_than_the_plain_formula(
    length: int,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    plain_scan: Callable[..., object],
    ragged_ids: Callable[..., Tensor],
    differentiate: Maker,
    assert_no_worse: Callable[..., None],
) -> None:
    inputs, ids = scan_inputs(2, 2, length), ragged_ids(0, 2, length, 20)
    plain = scanning(plain_scan, restart=ids.diff(dim=1, prepend=ids[:, :1]) != 0)
    ours, exact = (scanning(gated_scan, backend=b, document_ids=ids) for b in (fast, "reference"))
    low = differentiate(ours, inputs, torch.bfloat16)
    assert_no_worse(low, differentiate(plain, inputs, torch.bfloat16), differentiate(exact, inputs))
    assert [low[f"output {i}"].dtype for i in range(4)] == [torch.bfloat16] * 2 + [torch.float32] * 2


@every_backend
def test_the_state_is_fp32_whatever_the_inputs(
    backend: str, scan_inputs: Maker, scanning: Callable[..., object], differentiate: Maker
) -> None:
    inputs = scan_inputs(3, 2, 200)
    inputs["gate_bias"] += 6  # a memory of hundreds of tokens: a bf16 state would lose most increments
    low = differentiate(scanning(gated_scan, backend=backend), inputs, torch.bfloat16)
    exact = differentiate(scanning(gated_scan, backend="reference"), inputs)
    for i in (0, 1):
        torch.testing.assert_close(low[f"output {i}"], exact[f"output {i}"].bfloat16(), atol=1e-6, rtol=2**-7)
    for i in (2, 3):
        assert low[f"output {i}"].dtype == torch.float32
        torch.testing.assert_close(low[f"output {i}"], exact[f"output {i}"].float(), atol=5e-6, rtol=1e-5)


def test_packed_documents_equal_separate_ones(
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    # the first document of a row goes on from the state of an earlier call
    inputs, parts = scan_inputs(4, 2, 30), [[11, 1, 12, 6], [2, 14, 9, 5]]
    ids = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(p)) for p in parts])

    def separate(gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor, **states: Tensor) -> object:
        outputs, finals = [], []
        for b, sizes in enumerate(parts):
            initial: list[Tensor] | None = [s[b : b + 1] for s in states.values()]
            rows = []
            for logits, *streams in zip(*(x[b : b + 1].split(sizes, 1) for x in (gate_logits, v, k)), strict=True):
                out, last = gated_scan(logits, streams, gate_bias=gate_bias, initial_state=initial, backend=fast)
                rows.append(out)
                initial = None
            outputs.append([torch.cat(pieces, dim=1) for pieces in zip(*rows, strict=True)])
            finals.append(last)
        return [[torch.cat(x) for x in zip(*rows, strict=True)] for rows in (outputs, finals)]

    dtype, tolerance = PRECISION[fast]
    packed = scanning(gated_scan, document_ids=ids, backend=fast)
    assert_same(differentiate(packed, inputs, dtype), differentiate(separate, inputs, dtype), tolerance)


@pytest.mark.parametrize("backend", ["portable", NATIVE])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(length=st.integers(1, 75), cuts=st.lists(st.integers(1, 74), max_size=4, unique=True))
def test_a_sequence_cut_into_calls_equals_one_call(
    length: int,
    cuts: list[int],
    backend: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    edges = [0, *sorted(c for c in cuts if c < length), length]

    def in_calls(gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor, **states: Tensor) -> object:
        state, calls = tuple(states.values()), []
        for start, stop in pairwise(edges):
            now = slice(start, stop)
            out, state = gated_scan(
                gate_logits[:, now], (v[:, now], k[:, now]), gate_bias=gate_bias, initial_state=state, backend=backend
            )
            calls.append(out)
        return [torch.cat(pieces, dim=1) for pieces in zip(*calls, strict=True)], state

    inputs, (dtype, tolerance) = scan_inputs(5, 2, length), PRECISION[backend]
    one_call = scanning(gated_scan, backend="reference")
    assert_same(differentiate(in_calls, inputs, dtype), differentiate(one_call, inputs), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_that_are_open_or_shut_have_finite_gradients(
    fast: str,
    dtype: torch.dtype,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs = scan_inputs(6, 2, 70)
    inputs["gate_logits"] = inputs["gate_logits"].sign() * 40
    inputs["gate_bias"].zero_()
    ours = differentiate(scanning(gated_scan, backend=fast), inputs, dtype)
    assert all(x.isfinite().all() for x in ours.values())
    if dtype == torch.float32:
        assert_same(ours, differentiate(scanning(gated_scan, backend="reference"), inputs))


@pytest.mark.parametrize("backend", ["portable", NATIVE])
@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_of_only_the_outputs_or_only_the_last_states(
    part: int,
    backend: str,
    scan_inputs: Maker,
    scanning: Callable[..., Callable[..., tuple[object, object]]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    ours, theirs = (scanning(gated_scan, backend=b) for b in (backend, "reference"))
    inputs = scan_inputs(7, 2, 40)
    assert_same(*(differentiate(lambda op=op, **x: op(**x)[part], inputs, torch.float32) for op in (ours, theirs)))


@every_backend
def test_what_lies_past_a_rows_length_touches_nothing(
    backend: str, scan_inputs: Maker, scanning: Callable[..., object], differentiate: Maker
) -> None:
    lengths = torch.tensor([0, 9])
    inputs = scan_inputs(8, 2, 12)
    scan = scanning(gated_scan, lengths=lengths, backend=backend)
    before = differentiate(scan, inputs, PRECISION[backend][0])
    padding = 5.0 if backend == "reference" else float("nan")
    for name in ("gate_logits", "v", "k"):
        for row, length in enumerate(lengths.tolist()):
            inputs[name][row, length:] = padding
            assert (before[f"gradient of {name}"][row, length:] == 0).all()
    assert all(torch.equal(x, before[name]) for name, x in differentiate(scan, inputs, PRECISION[backend][0]).items())
    assert torch.equal(before["output 2"][0], inputs["v_state"][0].to(PRECISION[backend][0]))


@every_backend
def test_streams_keep_their_dtypes_whatever_the_gates(backend: str, draw: Callable[..., Tensor]) -> None:
    logits, v, k = draw(0, 2, 7, 6), draw(1, 2, 7, 6), draw(2, 2, 7, 2)
    expected, _ = gated_scan(logits, (v, k), backend="reference")
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        outputs, finals = gated_scan(logits.to(dtype), (v.to(other), k.to(dtype)), backend=backend)
        assert [x.dtype for x in (*outputs, *finals)] == [other, dtype, torch.float32, torch.float32]
        torch.testing.assert_close(outputs, expected, atol=1e-2, rtol=1e-2, check_dtype=False)


GOOD: dict[str, object] = {"gate_logits": torch.zeros(2, 5, 6), "streams": [torch.zeros(2, 5, 6), torch.zeros(2, 5, 3)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_logits": torch.zeros(5, 6)}, r"gate_logits must be \(B, T, D\).*got \(5, 6\)"),
        ({"gate_logits": torch.zeros(2, 0, 6)}, r"gate_logits must be .* >= 1, got \(2, 0, 6\)"),
        ({"streams": []}, "at least one stream"),
        ({"streams": [torch.zeros(2, 5, 6), torch.zeros(2, 5, 4)]}, r"stream 1 must be .*divisor of 6.*\(2, 5, 4\)"),
        ({"streams": [torch.zeros(2, 4, 6)]}, r"stream 0 must be \(2, 5, .*got \(2, 4, 6\)"),
        ({"streams": [torch.zeros(2, 5, 0)]}, r"stream 0 must be"),
        ({"streams": [torch.zeros(2, 5)]}, r"stream 0 must be"),
        ({"gate_bias": torch.zeros(3)}, r"gate_bias must be \(6,\), got \(3,\)"),
        ({"initial_state": [torch.zeros(2, 6)]}, r"initial_state must be 2 of \(2, 6\), got \[\(2, 6\)\]"),
        ({"initial_state": [torch.zeros(2, 6), torch.zeros(2, 3)]}, r"initial_state must be 2 of .*\(2, 3\)"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must be \(2,\), got \(3,\)"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"document_ids must be integers of shape \(2, 5\)"),
        ({"document_ids": torch.zeros(2, 5)}, r"document_ids must be integers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_scan(**{**GOOD, **change})
