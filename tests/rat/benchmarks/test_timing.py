"""Turns, medians and rates; no speed is asserted."""

from collections.abc import Callable

import pytest
import torch

from rat.benchmarks import timing

CPU = torch.device("cpu")


def test_candidates_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def lasts(name: str, *seconds: float) -> Callable[[], None]:
        rest = list(seconds)

        def run() -> None:
            order.append(name)
            clock[0] += rest.pop(0)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    medians = timing.interleaved({"a": lasts("a", 90, 1, 7, 2), "b": lasts("b", 0, 5, 5, 60)}, 3, CPU)
    assert order == ["a", "b"] * 4
    assert medians == {"a": 2, "b": 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_matrix_products_is_their_arithmetic_over_their_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    assert timing.gemm_rate(dtype, CPU, size=16) > 0
    monkeypatch.setattr(timing, "interleaved", lambda candidates, repeats, device: dict.fromkeys(candidates, 0.5))
    assert timing.gemm_rate(dtype, CPU, size=10) == 2 * 10**3 / 0.5


def test_the_machine_is_described() -> None:
    assert torch.__version__ in timing.machine(CPU)
    assert f"{torch.get_num_threads()} threads" in timing.machine(CPU)
