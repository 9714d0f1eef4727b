from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.benchmark import loader_throughput


@pytest.mark.parametrize("num_workers", [0, 2])
def test_throughput_of_given_shards(counting: Callable[..., Path], num_workers: int) -> None:
    # an epoch is three batches: the clock runs on into the next ones
    data = counting(100, shard_tokens=40)
    result = loader_throughput(data / "train", 4, 8, num_workers, seconds=0.1)
    assert result["tokens_per_second"] == pytest.approx(32 * result["batches_per_second"])
    assert result["tokens_per_second"] == result["tokens_per_second_per_worker"] * max(1, num_workers)
    assert result["num_shards"] == 3
    assert 0 < result["first_batch_seconds"] < 5


def test_shards_are_made_if_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.benchmark._MADE_TOKENS", 1 << 16)
    result = loader_throughput(seconds=0.1, num_workers=0, num_shards=5)
    assert result["num_shards"] == 5
    assert result["tokens_per_second"] > 1e6


def test_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds=0 must be positive"):
        loader_throughput(seconds=0)
