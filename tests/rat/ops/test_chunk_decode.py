"""A decoding step, every version of it. What is Triton's alone stands in test_triton_chunk_decode.py."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.ops import chunk_attention, chunk_decode, chunk_scan, rotary
from rat.ops.backend import HAS_TRITON, INTERPRETED, why_not_native
from rat.ops.chunk_decode import portable

Values = dict[str, Tensor]
Maker = Callable[..., Values]
CPU = torch.device("cpu")
FAST = [
    "portable",
    pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(CPU)), reason="no C++ compiler")),
    pytest.param("triton", marks=pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="no interpreter")),
]
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
fast_backends = pytest.mark.parametrize("backend", FAST)
WRITTEN = ("value_state", "key_state", "end_keys", "end_values")
# with chunks of 4: before the first token, inside the first chunk, at a chunk's first and at its last token
LENGTHS = [0, 3, 20, 31]
OPTIONS = {"chunk_size": 4, "rope_base": 20.0}


@every_backend
def test_without_preference_a_token_averages_itself_and_the_earlier_ends(backend: str) -> None:
    # a gate of 0 forgets: the state is the token itself
    state, cache = torch.zeros(2, 1, 1), torch.zeros(2, 1, 1, 3, 1)
    means = []
    for length, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0]):
        out = chunk_decode(
            torch.full((1, 1), -60.0), torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.tensor([[value]]),
            value_state=state[0], key_state=state[1], end_keys=cache[0], end_values=cache[1],
            lengths=torch.tensor([length]), longest=length, chunk_size=2, backend=backend,
        )  # fmt: skip
        means.append(out.item())
    assert means == pytest.approx([1, 2, 3, 5, 26 / 3])
    assert cache[1].flatten().tolist() == [2, 8, 16]


@every_backend
def test_the_state_halves_until_a_chunk_begins(backend: str) -> None:
    # a gate of 1/2 everywhere: logit -3, bias 3
    state = torch.tensor([[8.0], [8.0], [float("nan")]])
    cache = torch.zeros(2, 3, 1, 2, 1)
    chunk_decode(
        torch.full((3, 1), -3.0), torch.zeros(3, 1, 1), torch.full((3, 1), 4.0), torch.full((3, 1), 2.0),
        gate_bias=torch.tensor([3.0]), value_state=state, key_state=(keys := state.clone()),
        end_keys=cache[0], end_values=cache[1],
        lengths=torch.tensor([1, 5, 3]), longest=5, chunk_size=3, backend=backend,
    )  # fmt: skip
    assert state.flatten().tolist() == pytest.approx([5, 5, 1])
    assert keys.flatten().tolist() == pytest.approx([6, 6, 2])
    assert cache.squeeze().tolist() == [[[6, 0], [0, 6], [0, 2]], [[5, 0], [0, 5], [0, 1]]]


def whole(inputs: Values, rope_base: float | None, chunk_size: int) -> Tensor:
    """The layer's two operations over whole rows, (B, T, H, d)."""
    heads = inputs["v"].shape[-1] // inputs["q"].shape[-1]
    (v, k), _ = chunk_scan(
        inputs["gate_logits"],
        (inputs["v"], inputs["k"]),
        gate_bias=inputs["gate_bias"],
        chunk_size=chunk_size,
        backend="reference",
    )
    k, v = (x.unflatten(-1, (heads, -1)) for x in (k, v))
    return chunk_attention(inputs["q"], k, v, chunk_size=chunk_size, rope_base=rope_base, backend="reference")


@every_backend
@pytest.mark.parametrize(
    ("chunk_size", "rope_base", "groups", "heads"),
    [(1, 20.0, 2, 4), (2, 20.0, 1, 2), (3, None, 2, 4), (4, 20.0, 3, 3), (9, 20.0, 1, 2), (1, None, 1, 1)],
)
def test_steps_equal_scan_and_attention_over_whole_rows(
    backend: str, chunk_size: int, rope_base: float | None, groups: int, heads: int, draw: Callable[..., Tensor]
) -> None:
    width, length, starts = 4, 9, torch.tensor([0, 5, 2])
    sizes = {"gate_logits": heads * width, "q": groups * width, "k": groups * width, "v": heads * width}
    tokens: Values = {name: draw(i, 3, length, size) for i, (name, size) in enumerate(sizes.items())}
    tokens |= {"q": tokens["q"].unflatten(-1, (groups, width)), "gate_bias": draw(9, heads * width)}
    expected = whole(tokens, rope_base, chunk_size)
    wide = torch.float64 if backend in ("reference", "portable") else torch.float32
    states = torch.full((2, 3, heads * width), torch.nan, dtype=wide)
    caches = torch.full((2, 3, heads, -(-length // chunk_size), width), torch.nan, dtype=wide)
    for step in range(length):
        # rows start one after the other: each stands at its own length
        lengths = (step - starts).clamp(min=0)
        rows = torch.arange(3)
        out = chunk_decode(
            *(tokens[name][rows, lengths].to(wide) for name in sizes),
            gate_bias=tokens["gate_bias"].to(wide), value_state=states[0], key_state=states[1],
            end_keys=caches[0], end_values=caches[1], lengths=lengths, longest=step,
            chunk_size=chunk_size, rope_base=rope_base, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[rows, lengths].to(wide), rtol=1e-5, atol=1e-5)


def plain(
    gate_logits: Tensor, q: Tensor, k: Tensor, v: Tensor, *, value_state: Tensor, key_state: Tensor,
    end_keys: Tensor, end_values: Tensor, gate_bias: Tensor, lengths: Tensor, chunk_size: int, rope_base: float,
    **_: int,
) -> Tensor:  # fmt: skip
    """The step as anyone would write it, every number in the dtype of v."""
    heads, width = end_keys.shape[1], end_keys.shape[3]
    gate = torch.sigmoid(gate_logits + gate_bias.to(v.dtype))
    rows = []
    for state, y in ((value_state, v), (key_state, k)):
        before = torch.where(lengths[:, None] % chunk_size == 0, 0, state.to(v.dtype))
        state.copy_(gate * before + (1 - gate) * y.repeat(1, v.shape[1] // y.shape[1]))
    chunk = lengths[:, None] // chunk_size
    query, key = (
        rotary(x.to(v.dtype).unflatten(1, (-1, width))[:, None], chunk, base=rope_base)[:, 0]
        for x in (q.flatten(1).repeat(1, heads // q.shape[1]), key_state)
    )
    for b, c in enumerate(chunk.flatten().tolist()):
        end_keys[b, :, c], end_values[b, :, c] = key[b], value_state[b].view(heads, width)
        seen = (x[b, :, : c + 1] for x in (end_keys, end_values))
        rows.append(torch.nn.functional.scaled_dot_product_attention(query[b, :, None], *seen)[:, 0])
    return torch.stack(rows)


@fast_backends
@pytest.mark.parametrize("width", [4, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_version_is_worse_than_plain_pytorch(
    backend: str, width: int, dtype: torch.dtype, decode_inputs: Maker, decode: Maker, assert_no_worse: Callable
) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bf16 off instead of rounding it")
    inputs = decode_inputs(1, width=width)
    exact = decode(inputs, LENGTHS, backend="reference", **OPTIONS)
    ours = decode(inputs, LENGTHS, dtype, backend=backend, **OPTIONS)
    assert ours["output"].dtype == dtype
    assert_no_worse(ours, decode(inputs, LENGTHS, dtype, plain, **OPTIONS), exact)
    if dtype == torch.float32:
        torch.testing.assert_close({n: x.double() for n, x in ours.items()}, exact, rtol=2e-6, atol=2e-6)


@every_backend
def test_large_angles_are_exact(backend: str, decode_inputs: Maker, decode: Maker) -> None:
    # as far into a text as 100 000 chunks: with this base the second pair turns by 10 000 radians a chunk
    inputs = decode_inputs(2, batch=1, heads=2, slots=11)
    found = decode(inputs, [10], torch.float32, backend=backend, chunk_size=1, rope_base=1e-8)
    key = found["key_state"].double().view(1, 1, 2, 4)
    expected = rotary(key, torch.tensor([10]), base=1e-8, backend="reference")[:, 0]
    torch.testing.assert_close(found["end_keys"][:, :, 10].double(), expected, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_unused_slot_or_unwritten_memory_is_read(
    backend: str, dtype: torch.dtype, decode_inputs: Maker, decode: Maker, request: pytest.FixtureRequest
) -> None:
    inputs = decode_inputs(3)
    clean = decode(inputs, LENGTHS, dtype, backend=backend, **OPTIONS)
    request.getfixturevalue("nan_memory")
    hidden = {name: x.clone() for name, x in inputs.items()}
    for row, length in enumerate(LENGTHS):
        for name in ("end_keys", "end_values"):
            hidden[name][row, :, length // 4 :] = torch.nan
        if length % 4 == 0:
            for name in ("value_state", "key_state"):
                hidden[name][row] = torch.nan
    poisoned = decode(hidden, LENGTHS, dtype, backend=backend, **OPTIONS)
    for name in ("output", "value_state", "key_state"):
        assert torch.equal(poisoned[name], clean[name]), name
    for row, length in enumerate(LENGTHS):
        used = slice(length // 4 + 1)
        for name in ("end_keys", "end_values"):
            assert torch.equal(poisoned[name][row, :, used], clean[name][row, :, used]), name
            assert poisoned[name][row, :, length // 4 + 1 :].isnan().all()


@every_backend
def test_only_states_and_one_slot_a_row_are_written(backend: str, decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(4)
    given = {name: x.float() for name, x in inputs.items()}
    before = {name: x.clone() for name, x in given.items()}
    decode(given, LENGTHS, torch.float32, backend=backend, view=lambda x: x, **OPTIONS)
    for name, x in given.items():
        if name not in WRITTEN:
            assert torch.equal(x, before[name]), name
        elif name.endswith("state"):
            assert (x != before[name]).all(), name
        else:
            changed = (x != before[name]).all(-1).all(1)
            assert changed.tolist() == [[slot == length // 4 for slot in range(9)] for length in LENGTHS]
            assert torch.equal((x != before[name]).any(-1).any(1), changed)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    """As a layer hands on the parts of its projection."""
    return torch.cat([x[..., :1] - 7, x, x], dim=-1)[..., 1 : 1 + x.shape[-1]]


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]


def slots_first(x: Tensor) -> Tensor:
    return x.transpose(1, -2).contiguous().transpose(1, -2) if x.ndim == 4 else x.clone()


@every_backend
@pytest.mark.parametrize("view", [transposed, sliced, strided, slots_first])
def test_views_are_read_and_written_as_contiguous_tensors_are(
    backend: str, view: Callable[[Tensor], Tensor], decode_inputs: Maker, decode: Maker
) -> None:
    inputs = decode_inputs(5)
    assert not view(inputs["end_keys"]).is_contiguous()
    found = decode(inputs, LENGTHS, torch.float32, backend=backend, view=view, **OPTIONS)
    expected = decode(inputs, LENGTHS, torch.float32, backend=backend, **OPTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@fast_backends
def test_caches_may_be_narrower_than_what_comes(backend: str, decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(6)
    exact = decode(inputs, LENGTHS, backend="reference", **OPTIONS)

    def mixed(*new: Tensor, end_keys: Tensor, end_values: Tensor, **rest: object) -> Tensor:
        caches = {"end_keys": end_keys.half(), "end_values": end_values.half()}
        return chunk_decode(*new, **caches, **rest)

    found = decode(inputs, LENGTHS, torch.float32, mixed, backend=backend, **OPTIONS)
    assert found["output"].dtype == torch.float32
    torch.testing.assert_close(found["output"].double(), exact["output"], rtol=2e-3, atol=2e-3)


@every_backend
def test_without_a_bias_it_is_zero(backend: str, decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(7)
    zero = inputs | {"gate_bias": torch.zeros_like(inputs["gate_bias"])}
    without = {name: x for name, x in inputs.items() if name != "gate_bias"}
    found, expected = (decode(x, LENGTHS, torch.float32, backend=backend, **OPTIONS) for x in (without, zero))
    torch.testing.assert_close(found, expected)


def test_keys_are_widened_block_by_block(decode_inputs: Maker, decode: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = decode_inputs(8)
    whole = decode(inputs, LENGTHS, torch.float16, backend="portable", **OPTIONS)
    monkeypatch.setattr(portable, "BLOCK", 3 * 8 * 4)  # 3 of 16 heads; the rest is a block of 1
    torch.testing.assert_close(decode(inputs, LENGTHS, torch.float16, backend="portable", **OPTIONS), whole)


@fast_backends
def test_autocast_changes_nothing(backend: str, decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(9)
    expected = decode(inputs, LENGTHS, torch.float32, backend=backend, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(inputs, LENGTHS, torch.float32, backend=backend, **OPTIONS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_ops_keep_torch_librarys_promises(backend: str, dtype: torch.dtype, decode_inputs: Maker) -> None:
    inputs = decode_inputs(1, batch=2, groups=1, heads=2, slots=3)
    tensors = [x.to(torch.float32 if name.endswith(("state", "bias")) else dtype) for name, x in inputs.items()]
    module = importlib.import_module(f"rat.ops.chunk_decode.{backend}")
    op = module.chunk_decode if backend == "portable" else module._decode_op
    torch.library.opcheck(op, (*tensors, torch.tensor([5, 8]), 8, 4, 20.0))


@fast_backends
def test_a_compiled_step_gives_the_same_and_is_not_compiled_for_every_length(
    backend: str, decode_inputs: Maker
) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def steps(op: Callable[..., Tensor]) -> list[Tensor]:
        given = {name: x.float() for name, x in decode_inputs(1, batch=2, heads=2).items()}
        new = [given.pop(name) for name in ("gate_logits", "q", "k", "v")]
        outputs = []
        for n in range(5):
            lengths = torch.tensor([n, n + 3])
            outputs.append(op(*new, **given, lengths=lengths, longest=n + 3, backend=backend, **OPTIONS))
        return [*outputs, *(given[name] for name in WRITTEN)]

    for found, expected in zip(
        steps(torch.compile(chunk_decode, fullgraph=True, backend=counter)), steps(chunk_decode), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


@every_backend
@pytest.mark.parametrize("name", ["gate_logits", "q", "k", "v", "gate_bias", *WRITTEN])
def test_a_gradient_is_refused_not_wrong(backend: str, name: str, decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(1)
    inputs[name].requires_grad_()

    def op(*new: Tensor, **rest: object) -> Tensor:
        return chunk_decode(*new, backend=backend, **rest, **OPTIONS)

    with pytest.raises(ValueError, match=r"^chunk_decode has no gradient: use chunk_scan and chunk_attention, or"):
        decode(inputs, LENGTHS, op=op)
    with torch.no_grad():
        decode(inputs, LENGTHS, op=op)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(16)}, r"v must be \(B, D\) with B, D >= 1, got \(16,\)"),
        ({"v": torch.zeros(0, 16)}, r"v must be \(B, D\) with B, D >= 1, got \(0, 16\)"),
        ({"q": torch.zeros(4, 8)}, r"q must be \(4, G, d\) with G \* d dividing 16, got \(4, 8\)"),
        ({"q": torch.zeros(4, 3, 4)}, r"q must be \(4, G, d\) with G \* d dividing 16, got \(4, 3, 4\)"),
        ({"q": torch.zeros(3, 2, 4)}, r"q must be \(4, G, d\) with G \* d dividing 16, got \(3, 2, 4\)"),
        ({"k": torch.zeros(4, 16)}, r"k must be \(4, 8\), got \(4, 16\)"),
        ({"gate_logits": torch.zeros(4, 12)}, r"gate_logits must be \(4, 16\), got \(4, 12\)"),
        ({"gate_bias": torch.zeros(1)}, r"gate_bias must be \(16,\), got \(1,\)"),
        ({"value_state": torch.zeros(4, 8)}, r"value_state must be \(4, 16\), got \(4, 8\)"),
        ({"key_state": torch.zeros(1, 16)}, r"key_state must be \(4, 16\), got \(1, 16\)"),
        ({"end_keys": torch.zeros(4, 9, 4, 4)}, r"end_keys must be \(4, 4, 4, 4\), got \(4, 9, 4, 4\)"),
        ({"end_keys": torch.zeros(4, 4)}, r"end_keys must be \(4, 4, 1, 4\), got \(4, 4\)"),
        ({"end_values": torch.zeros(4, 4, 8, 4)}, r"end_values must be \(4, 4, 9, 4\), got \(4, 4, 8, 4\)"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, r"lengths must be \(4,\), got \(3,\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"longest": -1}, "longest must be at least 0, got -1"),
        ({"longest": 36}, "rows of 36 tokens need 10 slots for chunk ends of 4, got 9"),
        ({"backend": "fast"}, "unknown kernel backend 'fast'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str, decode_inputs: Maker) -> None:
    arguments = decode_inputs(1) | {"lengths": torch.tensor(LENGTHS), "longest": 31} | OPTIONS | change
    new = [arguments.pop(name) for name in ("gate_logits", "q", "k", "v")]
    with pytest.raises(ValueError, match="^" + message):
        chunk_decode(*new, **arguments)


def test_rotary_positions_need_pairs(decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(1, width=3)
    with pytest.raises(ValueError, match=r"^rotary positions need an even head width, got 3$"):
        decode(inputs, LENGTHS, **OPTIONS)
    found, exact = (decode(inputs, LENGTHS, torch.float32, chunk_size=4, backend=x) for x in ("auto", "reference"))
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("lengths", [[0, 3, 20, 32], [0, 3, 20, -1]])
@pytest.mark.skipif(bool(why_not_native(CPU)), reason="no C++ compiler")
def test_the_cpu_kernel_writes_nowhere_else(lengths: list[int], decode_inputs: Maker, decode: Maker) -> None:
    def op(*new: Tensor, **rest: object) -> Tensor:
        return chunk_decode(*new, **rest | {"longest": 31}, backend="native", **OPTIONS)

    with pytest.raises(ValueError, match=r"^lengths must lie between 0 and longest, 31, got \[0, 3, 20, (32|-1)\]"):
        decode(decode_inputs(1), lengths, torch.float32, op)
