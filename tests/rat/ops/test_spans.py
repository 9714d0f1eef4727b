"""The tables of tiles that FlexAttention is given, against the mask they stand for, and how often it is compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention

from rat.ops import spans

Draw = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "TILE", 4)


def bounds(seed: int, batch: int, length: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """First and last (B, T), which never fall; some spans are empty."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(num_keys + 1, (2, batch, length), generator=generator).sort(-1).values
    return both.amin(0), both.amax(0)


def listed(how_many: Tensor, which: Tensor, width: int) -> Tensor:
    """The tables as a mask of tiles, (B, rows, width)."""
    mask = torch.zeros(*which.shape[:1], *which.shape[2:-1], width, dtype=torch.bool)
    for b, row in torch.cartesian_prod(torch.arange(mask.shape[0]), torch.arange(mask.shape[1])).tolist():
        numbers = which[b, 0, row, : how_many[b, 0, row]].tolist()
        assert len(set(numbers)) == len(numbers)
        mask[b, row, numbers] = True
    return mask


@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (3, 9), (8, 8), (11, 2), (22, 30), (29, 5)])
@pytest.mark.parametrize("seed", range(6))
def test_the_tables_list_every_tile_that_is_seen(seed: int, length: int, num_keys: int) -> None:
    first, last = bounds(seed, 2, length, num_keys)
    last = torch.where(last == num_keys, 3 * num_keys, last)  # past the last key means the last key
    keys = torch.arange(num_keys)
    seen = (keys >= first[..., None]) & (keys < last[..., None])
    rows, columns = -(-length // 4), -(-num_keys // 4)
    grid = torch.nn.functional.pad(seen, (0, -num_keys % 4, 0, -length % 4)).unflatten(1, (-1, 4)).unflatten(3, (-1, 4))
    some, every = grid.any(4).any(2), grid[:, :, : min(4, length)].all(4).all(2)
    tables = spans.tiles(first, last, num_keys)
    assert {x.dtype for x in tables} == {torch.int32}
    partial, full = listed(*tables[:2], columns), listed(*tables[2:4], columns)
    assert not (partial & full).any()
    assert ((partial | full) >= some).all()
    assert torch.equal(full[:, : length // 4], every[:, : length // 4])
    assert torch.equal(listed(*tables[4:6], rows), partial.mT)
    assert torch.equal(listed(*tables[6:], rows), full.mT)


def test_a_window_visits_its_own_tiles() -> None:
    tokens = torch.arange(40)[None]
    how_many, which, full, full_which, *_ = spans.tiles((tokens - 8).clamp(min=0), tokens + 1, 40)
    # a tile of 4 queries: its own tile and the farthest in part, the one between whole
    assert how_many[0, 0].tolist() == [1, 1, *[2] * 8]
    assert full[0, 0].tolist() == [0, 1, *[1] * 8]
    assert which[0, 0, 5, :2].tolist() == [3, 5]
    assert full_which[0, 0, 5, 0] == 4


def test_queries_that_see_nothing_get_zeros(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    q, k, v = draw(0, 1, 6, 2, 4), draw(1, 1, 9, 2, 4), draw(2, 1, 9, 2, 4)
    first, last = torch.tensor([[0, 0, 2, 2, 5, 9]]), torch.tensor([[0, 0, 3, 4, 7, 99]])
    out, lse = spans.span_attention(q, k, v, first, last)
    assert lse[0, [0, 1, 5]].isneginf().all()
    assert (out[0, [0, 1, 5]] == 0).all()
    torch.testing.assert_close(out[0, 2], v[0, 2])
    torch.testing.assert_close(lse[0, 2], (q[0, 2] * k[0, 2]).sum(-1) / 2, check_dtype=False)


def test_one_graph_serves_all_lengths(draw: Draw) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(spans.span_attention, dynamic=True, fullgraph=True, backend=counter)
    for length, num_keys in ((5, 7), (12, 8), (13, 40)):
        q, k, v = draw(0, 3, length, 2, 4), draw(1, 3, num_keys, 2, 4), draw(2, 3, num_keys, 2, 4)
        compiled(q, k, v, *bounds(length, 3, length, num_keys))
    assert counter.frame_count == 1


def test_gpus_get_the_compiled_function_and_graphs_around_it_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x: ("compiled", f(x), options))
    run = spans.compiled_on_gpus(lambda x: x.name)

    class OnGPU:
        is_cuda, name = True, "gpu"

    class OnCPU:
        is_cuda, name = False, "cpu"

    assert run(OnGPU()) == ("compiled", "gpu", {"dynamic": True, "fullgraph": True})
    assert run(OnCPU()) == "cpu"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert run(OnGPU()) == "gpu"
