"""What the benchmarks' tests share: times that are known, and layers that fit in a moment."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.benchmark import Measurement, TaskSpec

from rat.benchmarks import layer
from rat.benchmarks.timing import Rates


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs once and takes about as many seconds as its place says; a machine of 1000 FLOP/s."""

    def interleaved(candidates: dict[str, Callable[[], object]], *_: object) -> dict[str, Measurement]:
        for run in candidates.values():
            run()
        spread = (0.5, 0.75, 1, 1.75, 2)
        return {
            name: Measurement(1, [place * x for x in spread], TaskSpec(name, ""))
            for place, name in enumerate(candidates, 1)
        }

    def rates(dtype: torch.dtype, device: torch.device) -> Rates:
        return Rates(flops_per_second=1000.0, bytes_per_second=500.0)

    monkeypatch.setattr(layer, "interleaved", interleaved)
    monkeypatch.setattr(layer, "measure_rates", rates)
