"""What the tests of several operations share, as fixtures: test modules do not import each other."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rat.ops import chunk_decode
from rat.ops.documents import positions

Values = dict[str, Tensor]


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """draw(seed, *shape): normal numbers in fp64 that bf16 holds exactly, so that every precision starts alike."""

    def normal(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().double()

    return normal


@pytest.fixture(scope="session")
def differentiate(draw: Callable[..., Tensor]) -> Callable[..., Values]:
    """differentiate(op, inputs, dtype): outputs and, for fixed random weights on them, every input's gradient.

    States and biases are never narrower than fp32.
    """

    def run(op: Callable[..., object], inputs: Values, dtype: torch.dtype = torch.float64) -> Values:
        wide = torch.promote_types(dtype, torch.float32)
        kept = {name: wide if name.endswith(("state", "bias")) else dtype for name in inputs}
        leaves = {name: x.to(kept[name], copy=True).requires_grad_() for name, x in inputs.items()}
        outputs = [x for x in tree_leaves(op(**leaves)) if isinstance(x, Tensor)]
        weights = [draw(97 + i, *out.shape).to(out.dtype) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
        values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        return values | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return run


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """assert_same(actual, expected): equal but for rounding in fp32 (or the `tolerance` given)."""

    def check(actual: Values, expected: Values, tolerance: float = 2e-5) -> None:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)

    return check


@pytest.fixture(scope="session")
def assert_no_worse() -> Callable[..., None]:
    """assert_no_worse(ours, plain, exact): at most twice as wrong as plain PyTorch in the same low precision."""

    def check(ours: Values, plain: Values, exact: Values) -> None:
        for name, value in exact.items():
            error, allowed = ((x[name].double() - value).abs().max().item() for x in (ours, plain))
            slack = value.abs().max().item() * 2**-11 if value.numel() else 0.0  # half a last place of fp16
            assert error <= 2 * allowed + slack, f"{name}: {error:.2e} against {allowed:.2e} of plain PyTorch"

    return check


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nothing has written to reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def ragged_ids() -> Callable[..., Tensor]:
    """ragged_ids(seed, batch, length, mean): rows cut into documents of random lengths."""

    def ids(seed: int, batch: int, length: int, mean: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(batch, length, generator=generator) < 1 / mean).cumsum(1)

    return ids


@pytest.fixture(scope="session")
def scan_inputs(draw: Callable[..., Tensor]) -> Callable[..., Values]:
    """scan_inputs(seed, batch, length): a gate of 6 channels, a stream as wide, one of 2 channels, their states."""

    def make(seed: int, batch: int, length: int, states: bool = True) -> Values:
        shapes = {
            "gate_logits": (batch, length, 6),
            "gate_bias": (6,),
            "v": (batch, length, 6),
            "k": (batch, length, 2),
        }
        if states:
            shapes |= {"v_state": (batch, 6), "k_state": (batch, 6)}
        return {name: draw(10 * seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    return make


@pytest.fixture(scope="session")
def scanning() -> Callable[..., Callable[..., object]]:
    """scanning(op, lengths=..., ...): the scan as a function of `scan_inputs`, what it leaves open set to zero."""

    def bind(op: Callable[..., object], **options: object) -> Callable[..., object]:
        def run(
            gate_logits: Tensor, gate_bias: Tensor, v: Tensor, k: Tensor, **states: Tensor
        ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
            initial = tuple(states.values()) or None
            outputs, finals = op(gate_logits, (v, k), gate_bias=gate_bias, initial_state=initial, **options)
            lengths = options.get("lengths")
            if isinstance(lengths, Tensor):
                past = torch.arange(v.shape[1]) >= lengths[:, None]
                outputs = [out.masked_fill(past[..., None], 0) for out in outputs]
            return outputs, finals

        return run

    return bind


@pytest.fixture(scope="session")
def dense_scan() -> Callable[..., object]:
    """The scan as one triangular matrix for each channel: W[t, j] = g_{j+1} ... g_t (1 - g_j) within a segment."""

    def run(
        gate_logits: Tensor,
        streams: tuple[Tensor, ...],
        *,
        gate_bias: Tensor,
        initial_state: tuple[Tensor, ...] | None,
        restart: Tensor,
        lengths: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        batch, length, width = gate_logits.shape
        log_gate = torch.nn.functional.logsigmoid(gate_logits + gate_bias)
        decay, segment = log_gate.cumsum(1), restart.cumsum(1)
        seen = torch.ones(length, length, dtype=torch.bool).tril() & (segment[:, :, None] == segment[:, None, :])
        weights = (decay[:, :, None] - decay[:, None]).masked_fill(~seen[..., None], -torch.inf).exp()
        outputs, finals = [], []
        for i, y in enumerate(streams):
            inflow = (1 - log_gate.exp()) * torch.cat([y] * (width // y.shape[-1]), dim=-1)
            out = torch.einsum("btjd,bjd->btd", weights, inflow)
            before = out.new_zeros(batch, width) if initial_state is None else initial_state[i]
            out = out + torch.where(segment[..., None] == 0, decay.exp() * before[:, None], 0)
            trace = torch.cat([before[:, None], out], dim=1)
            last = torch.full((batch,), length) if lengths is None else lengths
            outputs.append(out)
            finals.append(trace[torch.arange(batch), last])
        return outputs, finals

    return run


@pytest.fixture(scope="session")
def plain_scan() -> Callable[..., object]:
    """The scan as anyone would write it, every number in the dtype of the logits."""

    def run(
        gate_logits: Tensor,
        streams: tuple[Tensor, ...],
        *,
        gate_bias: Tensor,
        initial_state: tuple[Tensor, ...] | None,
        restart: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        gate = torch.sigmoid(gate_logits + gate_bias.to(gate_logits.dtype))
        outputs, finals = [], []
        for i, y in enumerate(streams):
            state = torch.zeros_like(gate[:, 0]) if initial_state is None else initial_state[i].to(gate.dtype)
            y = y.repeat(1, 1, gate.shape[-1] // y.shape[-1])
            trace = []
            for t in range(gate.shape[1]):
                state = state.masked_fill(restart[:, t, None], 0)
                state = gate[:, t] * state + (1 - gate[:, t]) * y[:, t]
                trace.append(state)
            outputs.append(torch.stack(trace, dim=1))
            finals.append(state)
        return outputs, finals

    return run


@pytest.fixture(scope="session")
def dense_chunk_attention() -> Callable[..., Tensor]:
    """Chunk attention as anyone would write it, with a mask, every number in the dtype of q."""

    def turn(x: Tensor, place: Tensor, base: float | None) -> Tensor:
        """Rotate pairs (x_i, x_{i + d/2}) by place (B, T) * base^(-2i/d)."""
        if base is None:
            return x
        half = x.shape[-1] // 2
        angle = place[..., None, None] * torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def run(
        q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, rope_base: float | None, document_ids: Tensor | None = None
    ) -> Tensor:
        """Softmax under an explicit (T x T) mask: the last tokens of earlier chunks and the token itself."""
        batch, length, heads, width = k.shape
        ids = torch.zeros(batch, length, dtype=torch.int64) if document_ids is None else document_ids
        document = (ids.diff(dim=1, prepend=ids[:, :1]) != 0).cumsum(1)
        place = positions(batch, length, document_ids, None, q.device)
        chunk, is_end = place // chunk_size, place % chunk_size == chunk_size - 1
        same = document[:, :, None] == document[:, None, :]
        seen = same & is_end[:, None, :] & (chunk[:, None, :] < chunk[:, :, None]) | torch.eye(length, dtype=torch.bool)
        q, k = turn(q, chunk, rope_base), turn(k, chunk, rope_base)
        rows = []
        for h in range(heads):
            logits = q[:, :, h % q.shape[2]] @ k[:, :, h].mT / width**0.5
            rows.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, h])
        return torch.stack(rows, dim=2)

    return run


@pytest.fixture(scope="session")
def decode_inputs(draw: Callable[..., Tensor]) -> Callable[..., Values]:
    """decode_inputs(seed, ...): one new token a row, states and caches; 4 heads, so that h mod 2 is not h // 2."""

    def make(
        seed: int, batch: int = 4, groups: int = 2, heads: int = 4, width: int = 4, slots: int = 9
    ) -> dict[str, Tensor]:
        row, cache = (batch, heads * width), (batch, heads, slots, width)
        shapes = {"gate_logits": row, "q": (batch, groups, width), "k": (batch, groups * width), "v": row}
        shapes |= {"value_state": row, "key_state": row, "end_keys": cache, "end_values": cache, "gate_bias": row[1:]}
        return {name: draw(10 * seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    return make


@pytest.fixture(scope="session")
def decode() -> Callable[..., Values]:
    """decode(inputs, lengths, dtype, ...): what `chunk_decode` gives for copies of the inputs, and what it writes.

    States and biases are never narrower than fp32; `view` makes other tensors of the same numbers.
    """

    def run(
        inputs: Values,
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float64,
        op: Callable[..., Tensor] = chunk_decode,
        view: Callable[[Tensor], Tensor] = torch.clone,
        **options: object,
    ) -> Values:
        wide = torch.promote_types(dtype, torch.float32)
        given = {n: view(x.to(wide if n.endswith(("state", "bias")) else dtype)) for n, x in inputs.items()}
        new = [given[name] for name in ("gate_logits", "q", "k", "v")]
        rest = {name: x for name, x in given.items() if name not in ("gate_logits", "q", "k", "v")}
        out = op(*new, **rest, lengths=torch.tensor(lengths), longest=max(lengths), **options)
        return {"output": out} | {name: x for name, x in rest.items() if name != "gate_bias"}

    return run
