import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat.ops import chunk_scan
from rat.ops.backend import why_not_native
from rat.ops.chunk_scan import portable as chunk_portable
from rat.ops.documents import positions
from rat.ops.gated_scan import portable

Maker = Callable[..., dict[str, Tensor]]
SHAPES = sorted({(size, t) for size in (1, 4, 16) for t in (1, size - 1, size, size + 1, 3 * size + 5) if t >= 1})
SHAPES += [(9, 9), (21, 21)]
SITUATIONS = ["whole rows", "continued", "ragged rows", "documents", "continued ragged documents"]
OFFSET = torch.tensor([0, 6])
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
fast_backends = pytest.mark.parametrize("backend", ["portable", NATIVE])
# what each is held to: only native computes in fp32 whatever it is given
PRECISION = {"portable": (torch.float64, 1e-10), "native": (torch.float32, 1e-5)}


@pytest.fixture(params=["portable", "portable, slabs of 1 chunk", "portable, walks of at most 3 tokens", NATIVE])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fast version, portable in sizes that make many pieces of a few tokens too."""
    if "slabs of 1 chunk" in request.param:
        monkeypatch.setattr(portable, "SLAB", 1)
    if "walks of at most 3 tokens" in request.param:
        monkeypatch.setattr(chunk_portable, "LONGEST_WALK", 3)
        monkeypatch.setattr(portable, "BLOCK", 3)
    return request.param.split(", ")[0]


@pytest.fixture
def options(ragged_ids: Callable[..., Tensor]) -> Callable[[str, int], dict[str, Tensor]]:
    """The options of a situation, for 2 rows of some length."""

    def make(situation: str, length: int) -> dict[str, Tensor]:
        offset = {"offset": OFFSET} if "continued" in situation else {}
        lengths = {"lengths": torch.tensor([length // 2, length])} if "ragged" in situation else {}
        ids = {"document_ids": ragged_ids(length, 2, length, 7)} if "documents" in situation else {}
        return offset | lengths | ids

    return make


def restarts(chunk_size: int, length: int, document_ids: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    return positions(2, length, document_ids, offset, torch.device("cpu")) % chunk_size == 0


@every_backend
def test_hand_made_numbers(backend: str) -> None:
    half, y = torch.zeros(1, 5, 1), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 5, 1)
    (out,), (last,) = chunk_scan(half, [y], chunk_size=2, backend=backend)
    assert out.flatten().tolist() == [0.5, 1.25, 2, 5, 8]
    assert last.tolist() == [[8]]
    state = [torch.tensor([[8.0]])]
    (out,), _ = chunk_scan(half, [y], chunk_size=3, initial_state=state, offset=torch.tensor([4]), backend=backend)
    assert out.flatten().tolist() == [4.5, 3.25, 2, 5, 10.5]
    (out,), _ = chunk_scan(half, [y], chunk_size=3, initial_state=state, offset=torch.tensor([6]), backend=backend)
    assert out.flatten().tolist() == [0.5, 1.25, 2.625, 4, 10]
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    (out,), _ = chunk_scan(half, [y], chunk_size=2, document_ids=ids, backend=backend)
    assert out.flatten().tolist() == [0.5, 1.25, 2, 4, 10]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("chunk_size", "length"), [(1, 5), (4, 17), (16, 15), (16, 53)])
def test_reference_equals_a_dense_matrix(
    chunk_size: int,
    length: int,
    situation: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    dense_scan: Callable[..., object],
    options: Callable[[str, int], dict[str, Tensor]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs, chosen = scan_inputs(0, 2, length, "continued" in situation), options(situation, length)
    reference = scanning(chunk_scan, chunk_size=chunk_size, backend="reference", **chosen)
    lengths = {name: chosen.pop(name) for name in ("lengths",) if name in chosen}
    dense = scanning(dense_scan, restart=restarts(chunk_size, length, **chosen), **lengths)
    assert_same(differentiate(reference, inputs), differentiate(dense, inputs), 1e-9)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_the_fast_versions_equal_the_reference(
    chunk_size: int,
    length: int,
    situation: str,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    options: Callable[[str, int], dict[str, Tensor]],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs, chosen = scan_inputs(1, 2, length, "continued" in situation), options(situation, length)
    ours, theirs = (
        differentiate(scanning(chunk_scan, chunk_size=chunk_size, backend=backend, **chosen), inputs, dtype)
        for backend, dtype in ((fast, torch.float32), ("reference", torch.float64))
    )
    assert_same(ours, theirs)


@fast_backends
@pytest.mark.parametrize("seed", range(8))
def test_any_sizes_agree(
    seed: int,
    backend: str,
    draw: Callable[..., Tensor],
    differentiate: Maker,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = random.Random(seed)
    batch, length, chunk_size, narrow = (choose.randint(1, most) for most in (4, 90, 40, 3))
    width = narrow * choose.choice([2, 6])
    monkeypatch.setattr(portable, "SLAB", choose.randint(1, 2000))
    inputs = {"gate_logits": draw(seed, batch, length, width), "gate_bias": draw(seed + 1, width)}
    inputs |= {"k": draw(seed + 2, batch, length, narrow), "v": draw(seed + 3, batch, length, width)}

    def op(backend: str) -> Callable[..., object]:
        return lambda gate_logits, gate_bias, k, v: chunk_scan(
            gate_logits, [k, v], gate_bias=gate_bias, chunk_size=chunk_size, backend=backend
        )

    assert_same(differentiate(op(backend), inputs, torch.float32), differentiate(op("reference"), inputs))


# chunks around the longest walk of portable, and around the most tokens of a part of native, which is compiled in
@pytest.mark.parametrize(
    ("backend", "chunk_size", "length"),
    [("portable", *sizes) for sizes in ((200, 450), (200, 130), (129, 129), (128, 300), (1000, 150))]
    + [
        pytest.param("native", *sizes, marks=NATIVE.marks) for sizes in ((16, 1100), (200, 700), (512, 900), (513, 900))
    ],
)
def test_long_rows_agree(
    backend: str,
    chunk_size: int,
    length: int,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    assert chunk_portable.LONGEST_WALK == 128
    inputs = scan_inputs(2, 1, length, False)
    inputs["gate_bias"] += 4  # long memories, so that the far end of a chunk counts
    ours, theirs = (
        differentiate(scanning(chunk_scan, chunk_size=chunk_size, backend=backend), inputs, dtype)
        for backend, dtype in ((backend, torch.float32), ("reference", torch.float64))
    )
    assert_same(ours, theirs, 5e-5)


@pytest.mark.parametrize("situation", ["whole rows", "continued", "documents"])
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_bf16_is_no_worse_than_the_plain_formula(
    chunk_size: int,
    length: int,
    situation: str,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    plain_scan: Callable[..., object],
    options: Callable[[str, int], dict[str, Tensor]],
    differentiate: Maker,
    assert_no_worse: Callable[..., None],
) -> None:
    inputs, chosen = scan_inputs(3, 2, length, "continued" in situation), options(situation, length)
    inputs["gate_bias"].abs_()  # as a RAT layer starts: log U(1, L - 1)
    plain = scanning(plain_scan, restart=restarts(chunk_size, length, **chosen))
    ours, exact = (scanning(chunk_scan, chunk_size=chunk_size, backend=b, **chosen) for b in (fast, "reference"))
    low = differentiate(ours, inputs, torch.bfloat16)
    assert_no_worse(low, differentiate(plain, inputs, torch.bfloat16), differentiate(exact, inputs))
    assert [low[f"output {i}"].dtype for i in range(4)] == [torch.bfloat16] * 2 + [torch.float32] * 2


@fast_backends
def test_gates_nearly_shut_lose_no_more_than_the_rounding_of_the_states(
    backend: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    plain_scan: Callable[..., object],
    differentiate: Maker,
) -> None:
    # portable's gradient of a logit comes from s_t - y_t with s_t as rounded in the output: a small difference of
    # large numbers; native's comes from s_{t-1} - y_t, which is large
    inputs = scan_inputs(8, 4, 64, False)
    inputs["gate_bias"] -= 4
    ours, reference = (scanning(chunk_scan, chunk_size=16, backend=b) for b in (backend, "reference"))
    low = differentiate(ours, inputs, torch.bfloat16)
    plain = differentiate(scanning(plain_scan, restart=restarts(16, 64).tile(2, 1)), inputs, torch.bfloat16)
    for name, exact in differentiate(reference, inputs).items():
        error, allowed = ((x[name] - exact).abs().max() for x in (low, plain))
        assert error <= (1.25 * allowed if backend == "native" else 2**-6 * exact.abs().max()), name


@every_backend
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_the_state_stays_fp32_from_call_to_call(
    tokens: int, backend: str, scan_inputs: Maker, scanning: Callable[..., object], differentiate: Maker
) -> None:
    inputs = scan_inputs(4, 1, 100, False)
    low = {name: x if name == "gate_bias" else x.bfloat16() for name, x in inputs.items()}
    low["gate_bias"] = inputs["gate_bias"] = inputs["gate_bias"] + 6  # a bf16 state would lose most increments
    exact = differentiate(scanning(chunk_scan, chunk_size=100, backend="reference"), inputs)
    state = (torch.zeros(1, 6), torch.zeros(1, 6))
    for start in range(0, 100, tokens):
        logits, v, k = (low[name][:, start : start + tokens] for name in ("gate_logits", "v", "k"))
        before = {"offset": torch.tensor([start]), "initial_state": state}
        _, state = chunk_scan(logits, (v, k), gate_bias=low["gate_bias"], chunk_size=100, backend=backend, **before)
    for i in (0, 1):
        assert state[i].dtype == torch.float32
        torch.testing.assert_close(state[i], exact[f"output {i + 2}"].float(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_packed_documents_equal_separate_ones_across_two_ragged_calls(
    chunk_size: int,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    # call 1 reads the beginnings of both rows (3 and 6 tokens), call 2 the other 24 tokens, further documents included
    inputs, begun, parts = scan_inputs(5, 2, 30, False), torch.tensor([3, 6]), [[12, 1, 8, 9], [8, 15, 2, 5]]
    ids = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(p)) for p in parts])
    tokens_of_calls = [torch.arange(6).expand(2, 6), torch.arange(24) + begun[:, None]]

    def two_calls(gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor) -> object:
        rows, calls = torch.arange(2)[:, None], []
        options: dict[str, object] = {"gate_bias": gate_bias, "chunk_size": chunk_size, "backend": fast}
        past: dict[str, object] = {"lengths": begun}
        for tokens in tokens_of_calls:
            logits, *streams = (x[rows, tokens] for x in (gate_logits, v, k))
            out, state = chunk_scan(logits, streams, **options, **past)
            past = {"initial_state": state, "offset": begun, "document_ids": ids[rows, tokens_of_calls[1]]}
            calls.append(out)
        joined = [
            torch.stack([torch.cat([early[b, :n], late[b, : 27 - n]]) for b, n in enumerate(begun.tolist())])
            for early, late in zip(*calls, strict=True)
        ]
        return joined

    def separate(gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor) -> object:
        outputs = []
        for b, sizes in enumerate(parts):
            pieces = zip(*(x[b : b + 1].split(sizes, dim=1) for x in (gate_logits, v, k)), strict=True)
            alone = [chunk_scan(g, s, gate_bias=gate_bias, chunk_size=chunk_size, backend=fast)[0] for g, *s in pieces]
            outputs.append([torch.cat(x, dim=1)[:, :27] for x in zip(*alone, strict=True)])
        return [torch.cat(x) for x in zip(*outputs, strict=True)]

    dtype, tolerance = PRECISION[fast]
    assert_same(differentiate(two_calls, inputs, dtype), differentiate(separate, inputs, dtype), tolerance)


@fast_backends
@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    length=st.integers(1, 60),
    chunk_size=st.integers(1, 70),
    cuts=st.lists(st.integers(1, 59), max_size=4, unique=True),
)
def test_a_sequence_cut_into_calls_equals_one_call(
    length: int,
    chunk_size: int,
    cuts: list[int],
    backend: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    edges = [0, *sorted(c for c in cuts if c < length), length]

    def in_calls(gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor) -> object:
        state, calls = None, []
        for start, stop in pairwise(edges):
            now = slice(start, stop)
            out, state = chunk_scan(
                gate_logits[:, now],
                (v[:, now], k[:, now]),
                chunk_size=chunk_size,
                gate_bias=gate_bias,
                initial_state=state,
                offset=torch.full((2,), start),
                backend=backend,
            )
            calls.append(out)
        return [torch.cat(pieces, dim=1) for pieces in zip(*calls, strict=True)], state

    inputs, (dtype, tolerance) = scan_inputs(6, 2, length, False), PRECISION[backend]
    one_call = scanning(chunk_scan, chunk_size=chunk_size, backend="reference")
    assert_same(differentiate(in_calls, inputs, dtype), differentiate(one_call, inputs), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_that_are_open_or_shut_have_finite_gradients(
    dtype: torch.dtype,
    fast: str,
    scan_inputs: Maker,
    scanning: Callable[..., object],
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    inputs = scan_inputs(7, 2, 37, False)
    inputs["gate_logits"] = inputs["gate_logits"].sign() * 40
    inputs["gate_bias"].zero_()
    ours = differentiate(scanning(chunk_scan, chunk_size=5, backend=fast), inputs, dtype)
    assert all(x.isfinite().all() for x in ours.values())
    if dtype == torch.float32:
        assert_same(ours, differentiate(scanning(chunk_scan, chunk_size=5, backend="reference"), inputs))


ONE_STATE = [torch.zeros(2, 6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"initial_state": ONE_STATE}, "initial_state needs offset"),
        ({"offset": torch.zeros(3, dtype=torch.int64)}, r"offset must be \(2,\), got \(3,\)"),
        ({"offset": OFFSET[:, None]}, r"offset must be \(2,\), got \(2, 1\)"),
        ({"gate_logits": torch.zeros(2, 5)}, r"gate_logits must be \(B, T, D\).*got \(2, 5\)"),
        ({"streams": []}, "at least one stream"),
        ({"streams": [torch.zeros(2, 5, 4)]}, r"stream 0 must be .*divisor of 6.*\(2, 5, 4\)"),
        ({"gate_bias": torch.zeros(6, 1)}, r"gate_bias must be \(6,\), got \(6, 1\)"),
        ({"initial_state": 2 * ONE_STATE, "offset": OFFSET}, r"initial_state must be 1 of \(2, 6\)"),
        ({"lengths": torch.zeros(2, 1, dtype=torch.int64)}, r"lengths must be \(2,\), got \(2, 1\)"),
        ({"document_ids": torch.zeros(2, 6, dtype=torch.int64)}, r"document_ids must be integers of shape \(2, 5\)"),
        ({"document_ids": torch.zeros(2, 5)}, r"document_ids must be integers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"gate_logits": torch.zeros(2, 5, 6), "streams": [torch.zeros(2, 5, 6)], "chunk_size": 2}
    with pytest.raises(ValueError, match=message):
        chunk_scan(**{**good, **change})
