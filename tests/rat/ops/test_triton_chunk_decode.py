"""The Triton kernel of a decoding step: shares of the ends, launches, costs. Its numbers: test_chunk_decode.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.ops.backend import HAS_TRITON, INTERPRETED
from rat.ops.launch import Launch, record_launches

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from rat.ops.chunk_decode import triton

Maker = Callable[..., dict[str, Tensor]]


@pytest.fixture
def few_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 2 ends and a share for each tile, up to 32 of them: more than are joined at a time."""
    monkeypatch.setattr(triton, "FEWEST_ENDS", 2)
    monkeypatch.setattr(triton, "PROGRAMS", 4 * 2 * 32)


def shares(launch: Launch) -> int:
    return launch.args["splits"]  # type: ignore[return-value]


def recorded(decode: Maker, inputs: dict[str, Tensor], lengths: list[int], **options: object) -> Launch:
    with record_launches((9, 0)) as launches:
        decode(inputs, lengths, torch.float32, backend="triton", **{"chunk_size": 4, "rope_base": 20.0} | options)
    (launch,) = launches
    return launch


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([0, 3, 1, 2], 1), ([11, 0, 3, 8], 1), ([12, 31, 4, 0], 4), ([170, 3, 90, 41], 32)],
)
@pytest.mark.parametrize("rope_base", [None, 20.0])
@pytest.mark.usefixtures("few_ends")
def test_shares_of_the_ends_join_to_one_softmax(
    lengths: list[int], expected: int, rope_base: float | None, decode_inputs: Maker, decode: Maker
) -> None:
    inputs = decode_inputs(1, heads=2, slots=43)
    # logits of very different sizes, so that every share may hold the largest
    inputs["end_keys"] *= torch.linspace(1, 9, 43, dtype=torch.float64)[:, None]
    options = {"chunk_size": 4, "rope_base": rope_base}
    assert shares(recorded(decode, inputs, lengths)) == expected
    exact = decode(inputs, lengths, backend="reference", **options)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 3e-3)):
        found = decode(inputs, lengths, dtype, backend="triton", **options)
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.usefixtures("few_ends")
def test_scratch_is_written_before_it_is_read(decode_inputs: Maker, decode: Maker, nan_memory: None) -> None:
    inputs = decode_inputs(2, heads=2, slots=43)
    found = decode(inputs, [170, 3, 90, 41], torch.float32, backend="triton", chunk_size=4, rope_base=20.0)
    assert all(x.isfinite().all() for x in found.values())


def test_shares_fill_a_gpu_without_becoming_too_short() -> None:
    assert [triton._shares(tasks, 256) for tasks in (1, 16, 128, 256, 511, 512, 4096)] == [4, 4, 4, 2, 2, 1, 1]
    assert [triton._shares(16, ends) for ends in (0, 64, 65, 128, 2048, 1 << 20)] == [1, 1, 2, 2, 32, 32]


def test_a_step_is_one_launch_that_is_compiled_once_for_all_lengths(decode_inputs: Maker, decode: Maker) -> None:
    inputs = decode_inputs(3, batch=1, heads=2, width=16, slots=700)
    launches = [recorded(decode, inputs, [length]) for length in (260, 700, 1023, 2799)]
    assert [shares(x) for x in launches] == [2, 4, 4, 16]
    first = launches[0]
    for launch in launches:
        assert launch.constants == first.constants
        assert (launch.num_warps, launch.num_stages) == (first.num_warps, first.num_stages)
        varying = {name for name, x in launch.args.items() if x != first.args[name]}
        assert varying <= {"splits"}


def test_the_cost_counts_what_the_programs_move(decode_inputs: Maker, decode: Maker) -> None:
    # two rows of 8 heads of 16, 5 ends each, fp32: one share
    inputs = decode_inputs(4, batch=2, heads=8, width=16, slots=6)
    cost = recorded(decode, inputs, [20, 20]).cost
    numbers = 2 * 8 * 16
    caches, queries = 2 * 5 * numbers, 2 * numbers
    # of value, key and the key's partner: logit, y, state and bias
    steps = 3 * 4 * numbers
    assert cost.bytes_read == 4 * (caches + queries + steps)
    assert cost.bytes_written == 4 * 5 * numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "FEWEST_ENDS", 2)
        split = recorded(decode, inputs, [20, 20])
    n = shares(split)
    scratch = n * (numbers + 2 * 2 * 8)
    assert n == 4
    assert split.cost.bytes_read == 4 * (caches + n * queries + steps + scratch)
    assert split.cost.bytes_written == 4 * (5 * numbers + scratch)


def test_bytes_are_within_a_tenth_of_the_least_possible() -> None:
    """The decoding step of the paper's layer: 64 rows at position 4096, bf16."""
    batch, heads, width, ends = 64, 16, 128, 256
    q = torch.empty(batch, 2, width, dtype=torch.bfloat16, device="meta")
    v = torch.empty(batch, heads * width, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(batch, heads, ends + 1, width, dtype=torch.bfloat16, device="meta")
    cost = triton._cost(
        q, v, keys, torch.empty(heads * width, device="meta"), ends, triton._shares(batch * heads, ends)
    )
    row = heads * width
    least = batch * (2 * ends * row * 2 + (2 + 2 + 4 + 4) * row + 2 * 2 * 2 * width) + 4 * row
    least += batch * row * (4 + 4 + 2 + 2 + 2)
    assert cost.bytes_read + cost.bytes_written <= 1.1 * least
