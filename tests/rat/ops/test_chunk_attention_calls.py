"""Chunk attention over several calls: `offset` and `ends` carry what went before."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat.ops import chunk_attention, rotary
from rat.ops.backend import why_not_native
from rat.ops.chunk_attention import native, portable

Maker = Callable[..., dict[str, Tensor]]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no C++"))
every_backend = pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
fast_backends = pytest.mark.parametrize("backend", ["portable", NATIVE])
# what each is held to: only native computes in fp32 whatever it is given
PRECISION = {"portable": (torch.float64, 1e-10), "native": (torch.float32, 2e-5)}


@pytest.fixture(scope="module")
def inputs(draw: Callable[..., Tensor]) -> Maker:
    shapes = {"q": 2, "k": 6, "v": 6}
    return lambda seed, batch, length: {
        name: draw(10 * seed + i, batch, length, n, 4) for i, (name, n) in enumerate(shapes.items())
    }


@pytest.fixture(params=["as shipped", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(portable, "BLOCK_LOGITS", 64)
        monkeypatch.setattr(native, "BLOCK_BYTES", 4 * 64)
        for version in (portable, native):
            monkeypatch.setattr(version, "FEWEST_ROWS", 3)


def ends_of(k: Tensor, v: Tensor, chunk_size: int, rope_base: float | None) -> tuple[Tensor, Tensor]:
    """Every chunk's end in rows that start at position 0, those far in the future included."""
    keys, values = k[:, chunk_size - 1 :: chunk_size], v[:, chunk_size - 1 :: chunk_size]
    if rope_base is not None:
        keys = rotary(keys, torch.arange(keys.shape[1]), base=rope_base, backend="reference")
    return keys, values


@pytest.mark.usefixtures("_blocks")
@every_backend
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 40])
def test_rows_at_different_offsets_equal_the_same_tokens_of_whole_rows(
    chunk_size: int,
    rope_base: float | None,
    backend: str,
    inputs: Maker,
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    # ends are those of the whole rows: a token may not look at the ones still to come
    offset, values = torch.tensor([0, 8, 13]), inputs(0, 3, 33)
    rows, tokens = torch.arange(3)[:, None], torch.arange(15) + offset[:, None]
    whole = partial(chunk_attention, chunk_size=chunk_size, rope_base=rope_base, backend="reference")

    def from_the_middle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        now = (x[rows, tokens] for x in (q, k, v))
        past = {"offset": offset, "ends": ends_of(k, v, chunk_size, rope_base)}
        return chunk_attention(*now, chunk_size=chunk_size, rope_base=rope_base, backend=backend, **past)

    expected = differentiate(lambda q, k, v: whole(q, k, v)[rows, tokens], values)
    if backend == "reference":
        assert_same(differentiate(from_the_middle, values), expected, 1e-10)
    else:
        assert_same(differentiate(from_the_middle, values, torch.float32), expected)


@pytest.mark.usefixtures("_blocks")
@fast_backends
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 9])
def test_a_first_document_goes_on_from_its_ends_and_the_next_ones_start_anew(
    chunk_size: int,
    rope_base: float | None,
    backend: str,
    inputs: Maker,
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    # row 0 has 6 of its first document's 12 tokens behind it, row 1 none of its 3; both read 24 tokens more
    values, offset, parts = inputs(1, 2, 30), torch.tensor([6, 0]), [[12, 1, 8, 9], [3, 12, 9, 6]]
    ids = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(p)) for p in parts])
    rows, tokens = torch.arange(2)[:, None], torch.arange(24) + offset[:, None]
    op = partial(chunk_attention, chunk_size=chunk_size, rope_base=rope_base, backend=backend)

    def continued(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        now = (x[rows, tokens] for x in (q, k, v))
        ends = ends_of(k[:, :12], v[:, :12], chunk_size, rope_base)
        return op(*now, offset=offset, ends=ends, document_ids=ids[rows, tokens])

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = []
        for b, sizes in enumerate(parts):
            documents = zip(*(x[b : b + 1].split(sizes, dim=1) for x in (q, k, v)), strict=True)
            whole.append(torch.cat([op(*document) for document in documents], dim=1))
        return torch.cat(whole)[rows, tokens]

    dtype, tolerance = PRECISION[backend]
    assert_same(differentiate(continued, values, dtype), differentiate(separate, values, dtype), tolerance)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_ends_may_be_more_than_are_seen(dtype: torch.dtype, backend: str, inputs: Maker) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 2, 6).values())
    offset, ends = torch.tensor([5, 2]), tuple(x.to(dtype) for x in list(inputs(3, 2, 9).values())[1:])
    call = partial(chunk_attention, q, k, v, chunk_size=4, rope_base=20.0, offset=offset, backend=backend)
    needed = call(ends=(ends[0][:, :2], ends[1][:, :2]))  # chunks 1 and 2 of row 0 see two ends at most
    torch.testing.assert_close(call(ends=ends), needed)
    spoilt = tuple(torch.cat([x[:, :2], torch.full_like(x[:, 2:], 1e9)], dim=1) for x in ends)
    torch.testing.assert_close(call(ends=spoilt), needed)


@every_backend
def test_a_token_beyond_the_given_ends_sees_those_there_are(backend: str) -> None:
    v = torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)
    zero, ends = torch.zeros_like(v), (torch.zeros(1, 2, 1, 1), torch.tensor([8.0, 16.0]).view(1, 2, 1, 1))
    out = chunk_attention(zero, zero, v, chunk_size=2, offset=torch.tensor([7]), ends=ends, backend=backend)
    assert out.flatten().tolist() == pytest.approx([25 / 3, 26 / 3, 28 / 3])


@every_backend
def test_no_ends_at_all_are_enough_inside_the_first_chunk(
    backend: str, inputs: Maker, differentiate: Maker, assert_same: Callable[..., None]
) -> None:
    none = (torch.zeros(2, 0, 6, 4),) * 2
    options = {"chunk_size": 8, "rope_base": 20.0, "offset": torch.tensor([0, 4]), "ends": none}
    values = inputs(4, 2, 4)
    found = differentiate(partial(chunk_attention, backend=backend, **options), values, torch.float32)
    assert_same({"output 0": found["output 0"]}, {"output 0": values["v"]})
    assert (found["gradient of q"] == 0).all()
    assert (found["gradient of k"] == 0).all()


@fast_backends
@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    length=st.integers(1, 40),
    chunk_size=st.integers(1, 45),
    rope_base=st.sampled_from([None, 20.0]),
    cuts=st.lists(st.integers(1, 39), max_size=4, unique=True),
)
def test_a_sequence_cut_into_calls_equals_one_call(
    length: int,
    chunk_size: int,
    rope_base: float | None,
    cuts: list[int],
    backend: str,
    inputs: Maker,
    differentiate: Maker,
    assert_same: Callable[..., None],
) -> None:
    edges = [0, *sorted(c for c in cuts if c < length), length]

    def in_calls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for start, stop in pairwise(edges):
            outputs.append(
                chunk_attention(
                    *(x[:, start:stop] for x in (q, k, v)),
                    chunk_size=chunk_size,
                    rope_base=rope_base,
                    offset=torch.full((2,), start),
                    ends=ends_of(k[:, :stop], v[:, :stop], chunk_size, rope_base),
                    backend=backend,
                )
            )
        return torch.cat(outputs, dim=1)

    values, (dtype, tolerance) = inputs(5, 2, length), PRECISION[backend]
    one_call = partial(chunk_attention, chunk_size=chunk_size, rope_base=rope_base, backend="reference")
    assert_same(differentiate(in_calls, values, dtype), differentiate(one_call, values), tolerance)
