"""Turns, medians and rates; no speed is asserted."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.benchmark import Measurement, TaskSpec

from rat.benchmarks import timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only entry."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_candidates_take_turns_and_warming_up_does_not_count(clock: list[float]) -> None:
    order = []

    def lasts(name: str, *seconds: float) -> Callable[[], None]:
        rest = list(seconds)

        def run() -> None:
            order.append(name)
            clock[0] += rest.pop(0)

        return run

    measured = timing.interleaved({"a": lasts("a", 90, 1, 7, 2), "b": lasts("b", 0, 5, 5, 6, 60)}, 3, CPU)
    assert order == ["a", "b", "b"] + ["a", "b"] * 3, "who took long to warm up does so once"
    assert {name: time.times for name, time in measured.items()} == {"a": [1, 7, 2], "b": [5, 6, 60]}
    assert {name: time.median for name, time in measured.items()} == {"a": 2, "b": 6}
    assert measured["a"].iqr == 3, "from 1.5 to 4.5"


def test_short_work_is_repeated_within_a_turn(clock: list[float]) -> None:
    calls = []

    def run() -> None:
        calls.append(clock[0])
        clock[0] += 0.004

    measured = timing.interleaved({"short": run}, 2, CPU)["short"]
    assert len(calls) == 2 + 2 * 3, "10 ms take three runs of 4 ms"
    assert measured.times == pytest.approx([0.004, 0.004])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    drawn = torch.get_rng_state()
    assert timing.gemm_rate(dtype, CPU, size=16) > 0
    assert torch.equal(torch.get_rng_state(), drawn), "or the weights of a run would depend on the machine's speed"
    assert timing.copy_rate(CPU, num_bytes=64) > 0

    def half_a_second(candidates: dict[str, Callable[[], object]], *_: object) -> dict[str, Measurement]:
        for run in candidates.values():
            run()
        return {name: Measurement(1, [0.5], TaskSpec(name, "")) for name in candidates}

    monkeypatch.setattr(timing, "interleaved", half_a_second)
    assert timing.gemm_rate(dtype, CPU, size=10) == 2 * 10**3 / 0.5
    assert timing.copy_rate(CPU, num_bytes=400) == 2 * 400 / 0.5
    rates = timing.Rates(gemm := 3e9, 2.5e9)
    assert rates.flops_per_second == gemm
    assert rates.arithmetic == gemm
    assert str(rates) == "matrix products at 3 GFLOP/s, copies at 2.5 GB/s"


@pytest.mark.parametrize(
    ("fp32", "most", "said"), [(4e9, 4e9, "3 GFLOP/s (in fp32 at 4), copies"), (2e9, 3e9, "3 GFLOP/s, copies")]
)
def test_a_narrow_dtype_may_be_computed_in_fp32(
    fp32: float, most: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {torch.bfloat16: 3e9, torch.float32: fp32}
    monkeypatch.setattr(timing, "gemm_rate", lambda dtype, device: found[dtype])
    monkeypatch.setattr(timing, "copy_rate", lambda device: 1e9)
    rates = timing.measure_rates(torch.bfloat16, CPU)
    assert rates.arithmetic == most
    assert said in str(rates)
    assert timing.measure_rates(torch.float32, CPU) == (fp32, 1e9, 0.0)
