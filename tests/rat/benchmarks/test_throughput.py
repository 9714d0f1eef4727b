"""The throughput of tiny models: budgets are kept, the arithmetic is right, one run is real."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from rat.benchmarks import throughput
from rat.benchmarks.capacity import Capacity
from rat.benchmarks.process import KilledError
from rat.benchmarks.serving import Served, Workload, rehearse, serve
from rat.benchmarks.timing import Rates

TINY: dict[str, Any] = {
    "prompt_length": 8, "new_tokens": 5, "d_model": 16, "d_head": 4, "num_layers": 2, "vocab_size": 40,
    "chunk_size": 4, "window_size": 3, "dtype": "float32", "memory_gb": 1e-4, "repeats": 3,
}  # fmt: skip
FIXED, EXTRA = 20_000, 100
Log = list[tuple[str, str, int]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[throughput.Throughput]]:
    """The benchmark of tiny models in this folder, on a machine whose rates are known."""
    monkeypatch.setattr(throughput, "measure_rates", lambda dtype, device: Rates(1e6, 2e6))
    return lambda *patterns, **options: throughput.throughput_benchmark(
        patterns or ("attention", "rat"), output=tmp_path, **TINY | options
    )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What was run, as (function, first mixer, batch); rows take their cache and a little, and a run 2, 4, 6, ... s."""
    calls: Log = []

    def run(function: Callable[..., object], workload: Workload, batch: int) -> int | Served:
        name = workload.config.pattern[0]
        calls.append((function.__name__, name, batch))
        peak = FIXED + batch * (state_bytes(name) + EXTRA)
        if function is rehearse:
            return peak
        assert function is serve
        round_ = sum(call[:2] == ("serve", name) for call in calls)
        return Served(1.0, 2.0 * round_, peak)

    monkeypatch.setattr(throughput, "in_fresh_process", run)
    return calls


def state_bytes(name: str) -> int:
    """Of 13 tokens in two layers, fp32."""
    return 4 * 2 * {"attention": 2 * 13 * 16, "rat": 2 * 4 * 16 + 2 * 16, "rnn": 16}[name]


def test_batches_fill_the_budget_and_the_models_take_turns(
    bench: Callable[..., list[throughput.Throughput]], log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = bench()
    for row in table:
        name = row.contender
        limit = (1 - throughput.HEADROOM) * 100_000
        assert FIXED + row.batch_size * (state_bytes(name) + EXTRA) == row.peak_bytes <= limit
        step = max(1, int(0.02 * row.batch_size))
        assert FIXED + (row.batch_size + step) * (state_bytes(name) + EXTRA) > limit
        assert row.state_bytes == state_bytes(name)
    attention, rat = table
    assert [call[1] for call in log if call[0] == "serve"] == ["attention", "rat"] * 3
    # steps for four of five new tokens; two, four and six seconds
    assert attention.decode_seconds == [2, 4, 6]
    assert rat.tokens_per_second == 4 * rat.batch_size / 4
    assert rat.with_prompt_tokens_per_second == 5 * rat.batch_size / (1 + 4)
    assert rat.iqr_tokens_per_second == pytest.approx(4 * rat.batch_size * ((1 / 2 + 1 / 4) - (1 / 4 + 1 / 6)) / 2)
    assert (attention.ratio, attention.with_prompt_ratio) == (1, 1)
    assert rat.ratio == pytest.approx(rat.batch_size / attention.batch_size)
    assert rat.times_floor == pytest.approx(4 / rat.floor_seconds)
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert [row["batch_size"] for row in written["rows"]] == [row.batch_size for row in table]
    assert written["options"]["budget_bytes"] == 100_000
    assert written["complete"] is True
    assert matplotlib.image.imread(tmp_path / "throughput.png").std() > 0.05
    printed = capsys.readouterr().out
    assert f"attention: a batch of {attention.batch_size} takes 0.000 GB" in printed
    assert "8 tokens of prompt, 5 new ones" in printed


def test_the_floor_is_that_of_all_steps(bench: Callable[..., list[throughput.Throughput]], log: Log) -> None:
    (row,) = bench("attention")
    batch, position = row.batch_size, 8 + 2
    # weights once a step: embedding, two blocks with their two norms, the last norm
    weights = 40 * 16 + 2 * (12 * 16**2 + 2 * 16) + 16
    per_row = 40 + 2 * (2 * position * 16 + 2 * 16)
    num_bytes = 4 * (weights + batch * per_row)
    flops = batch * (2 * 40 * 16 + 2 * (24 * 16**2 + 4 * position * 16))
    expected = max((num_bytes / 2e6, "bytes"), (flops / 1e6, "arithmetic"))
    assert (row.floor_seconds, row.floor_limit) == (pytest.approx(4 * expected[0]), expected[1])


def test_a_run_that_takes_more_than_its_rehearsal_is_made_again_with_fewer_rows(
    bench: Callable[..., list[throughput.Throughput]],
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = throughput.in_fresh_process

    def heavier(function: Any, workload: Any, batch: Any) -> Any:
        result = run(function, workload, batch)
        if isinstance(result, Served):
            if batch > 60:
                raise KilledError("-9")
            return result._replace(peak_bytes=result.peak_bytes + 30_000)
        return result

    monkeypatch.setattr(throughput, "in_fresh_process", heavier)
    table = bench(repeats=2)
    for row in table:
        assert row.peak_bytes == FIXED + 30_000 + row.batch_size * (state_bytes(row.contender) + EXTRA) <= 100_000
        assert row.batch_size > 10
        assert len(row.decode_seconds) == 2
    assert "rat: not within the budget, once more with a batch of" in capsys.readouterr().out


def test_runs_of_a_batch_that_was_too_large_do_not_count(
    bench: Callable[..., list[throughput.Throughput]], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = throughput.in_fresh_process

    def heavier_once(function: Any, workload: Any, batch: Any) -> Any:
        result = run(function, workload, batch)
        third = [call[0] for call in log].count("serve") == 3
        return result._replace(peak_bytes=200_000) if isinstance(result, Served) and third else result

    monkeypatch.setattr(throughput, "in_fresh_process", heavier_once)
    (row,) = bench("rat", repeats=3)
    # runs take 2, 4, 6, ... seconds: the first three are gone, as many were made with fewer rows
    assert row.decode_seconds == [8, 10, 12]
    assert [call[2] for call in log if call[0] == "serve"][3:] == [row.batch_size] * 3
    assert row.peak_bytes <= 100_000


def test_an_interruption_leaves_the_finished_rounds(
    bench: Callable[..., list[throughput.Throughput]], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = throughput.in_fresh_process

    def stopped(*args: Any) -> Any:
        if sum(call[0] == "serve" for call in log) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(throughput, "in_fresh_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench()
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert [len(row["decode_seconds"]) for row in written["rows"]] == [2, 1]
    assert written["complete"] is False
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_a_real_run_holds_what_its_rehearsal_held(
    bench: Callable[..., list[throughput.Throughput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[int | None] = []

    def four(peak_of: Callable[[int], int | None], budget: int, row_bytes: int) -> Capacity:
        rehearsed.append(peak_of(4))
        return Capacity(4, 0)

    monkeypatch.setattr(throughput, "largest_batch", four)
    (row,) = bench("rat+rnn", memory_gb=0.2, repeats=1, d_model=64, d_head=16, num_layers=4, vocab_size=100_000)
    weights = 4 * row.parameters
    assert row.batch_size == 4
    assert row.tokens_per_second is not None
    assert row.tokens_per_second > 0
    for peak in (row.peak_bytes, rehearsed[0]):
        assert peak is not None
        assert weights <= peak < 1.5 * weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["rat", "atention"]}, r"pattern must name \('rat', 'attention', .*\), got \['atention'\]"),
        ({"patterns": []}, "name at least one pattern"),
        ({"patterns": ["rat", "rat"]}, "each of them once"),
        ({"patterns": ["rat+rnn+attention"]}, "pattern has 3 mixers for num_layers 2"),
        ({"memory_gb": None}, "give --memory_gb: on a CPU"),
        ({"memory_gb": 0}, "memory_gb must be above 0, got 0"),
        ({"memory_gb": 1e9}, "memory_gb is 1000000000.0, but only .* GB are free"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"prompt_length": 0}, "prompt_length must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"d_head": 3}, "d_model 16 is not divisible by d_head 3"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "cuda:77"}, "there is no device 'cuda:77' here"),
        ({"backend": "best"}, "unknown kernel backend 'best'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        throughput.throughput_benchmark(output=tmp_path, **TINY | options)
    assert not list(tmp_path.iterdir())


def test_a_budget_for_no_row_is_refused(bench: Callable[..., list[throughput.Throughput]], log: Log) -> None:
    with pytest.raises(ValueError, match=r"one row needs 0.000 GB, the budget is 0.000 GB: raise --memory_gb"):
        bench(memory_gb=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_budget_is_what_is_free(tmp_path: Path) -> None:
    table = throughput.throughput_benchmark(
        ("rat",), output=tmp_path, **TINY | {"device": "cuda", "memory_gb": 0.01, "repeats": 1}
    )
    assert table[0].peak_bytes <= 1e7
    free = throughput._budget(None, torch.device("cuda"))
    assert 0 < free < torch.cuda.get_device_properties(0).total_memory
