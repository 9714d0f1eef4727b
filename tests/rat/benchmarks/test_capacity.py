"""The search for the largest batch, on budgets and memories that are made up."""

from collections.abc import Callable

import pytest

from rat.benchmarks.capacity import PRECISION, largest_batch


def memory(row: int, fixed: int, jitter: int = 0) -> tuple[Callable[[int], int], list[int]]:
    """Peaks of batches, `jitter` up and down in turn, and the batches that were tried."""
    tried: list[int] = []

    def peak_of(batch: int) -> int:
        tried.append(batch)
        return fixed + row * batch + jitter * (-1) ** len(tried)

    return peak_of, tried


@pytest.mark.parametrize("budget", [1100, 1199, 2000, 40_000, 1_000_000, 123_456_789])
@pytest.mark.parametrize("row", [100, 130, 1000])
@pytest.mark.parametrize("told", [100, 60])
def test_the_batch_fits_and_a_somewhat_larger_one_would_not(budget: int, row: int, told: int) -> None:
    peak_of, tried = memory(row, fixed=1000 - row)
    found = largest_batch(peak_of, budget, told)
    assert found.peak_bytes == 1000 + row * (found.batch_size - 1) <= budget
    larger = found.batch_size + max(1, int(PRECISION * found.batch_size))
    assert 1000 + row * (larger - 1) > budget
    assert found.batch_size in tried, "only what was measured counts"
    assert len(tried) == len(set(tried)) <= 6


@pytest.mark.parametrize("jitter", [5000, 20_000])
def test_noise_does_not_lead_it_beyond_the_budget(jitter: int) -> None:
    peak_of, tried = memory(1000, fixed=100_000, jitter=jitter)
    found = largest_batch(peak_of, 1_000_000, 1000)
    assert found.peak_bytes <= 1_000_000
    assert 850 < found.batch_size < 950
    assert len(tried) < 15


def test_running_out_of_memory_is_too_many() -> None:
    tried = []

    def peak_of(batch: int) -> int | None:
        tried.append(batch)
        return 10 * batch if batch <= 57 else None

    assert largest_batch(peak_of, 10_000, 10) == (57, 570)
    assert len(tried) < 15


@pytest.mark.parametrize(("peak", "needed"), [(1001, "0.000 GB"), (None, "more than there is")])
def test_a_budget_below_one_row_is_refused(peak: int | None, needed: str) -> None:
    with pytest.raises(ValueError, match=f"one row needs {needed}, the budget is 0.000 GB: raise --memory_gb"):
        largest_batch(lambda _: peak, 1000, 10)
