"""Bytes of layers: sums made by hand, the table, and what it writes."""

import json
from pathlib import Path
from typing import Any, get_args

import matplotlib.image
import pytest
import torch

from rat.benchmarks import contenders, footprint, memory
from rat.benchmarks.contenders import Contender
from rat.layers import Attention

SMALL: dict[str, Any] = {"d_model": 16, "d_head": 4, "chunk_size": 4, "window_size": 5}
CPU = torch.device("cpu")


def test_storages_are_kept_whole_and_once_and_weights_not_at_all() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    # x for the weight's gradient; y for its sine; the part of y for the square, a view of y
    assert footprint.kept_bytes(lambda: (y := x @ weight).sin().sum() + y[:2].square().sum(), [x], [weight]) == 2 * 192
    assert footprint.kept_bytes(lambda: x + 1, [x], []) == 192, "the input counts, kept or not"
    assert footprint.kept_bytes(lambda: x @ weight, [x], []) == 192 + 256


def test_the_peak_is_the_most_at_a_time() -> None:
    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        torch.empty(600)
        del b

    assert footprint.peak_bytes(run, CPU) == pytest.approx(6000, abs=200), "the allocator may round"


def test_the_process_peak_sees_what_was_freed() -> None:
    before = footprint.ProcessPeak(CPU)
    x = torch.ones(1 << 24)
    del x
    assert before.bytes() == pytest.approx(1 << 26, rel=0.2)
    assert footprint.ProcessPeak(CPU).bytes() < 1 << 24, "a new one starts anew"


def test_attention_keeps_what_its_backward_needs(tmp_path: Path) -> None:
    (row,) = memory.memory_benchmark([32], ["attention"], batch_size=2, output=tmp_path, **SMALL)
    x = 2 * 32 * 16 * 4
    # x, the projection that v is a part of, q and k (rotated), the output; little: log-sum-exp and the angles
    projection, angles, sums = 3 * x, 4 * 32 * 2 * 4, 2 * 4 * 32 * 4
    assert row.kept_bytes is not None
    assert 0 < row.kept_bytes - (x + projection + 2 * x + x) <= sums + angles
    assert row.cache_bytes == 2 * 32 * 16 * 4
    assert row.peak_bytes is not None
    # weights and their gradients, x and y and theirs, and what is kept beside x
    assert row.peak_bytes > 4 * 2 * 4 * 16**2 + 4 * x + row.kept_bytes - x - projection


def test_every_contender_at_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("attention", *(name for name in get_args(Contender) if name != "attention"))
    table = memory.memory_benchmark([8, 18], names, dtype="bfloat16", output=tmp_path, **SMALL)
    assert [(row.seq_len, row.contender) for row in table] == [(length, name) for length in (8, 18) for name in names]
    of = {row.contender: row for row in table if row.seq_len == 18}
    for row in of.values():
        assert row.kept_ratio == row.kept_bytes / of["attention"].kept_bytes
        assert row.peak_ratio == row.peak_bytes / of["attention"].peak_bytes
        assert row.cache_ratio == row.cache_bytes / of["attention"].cache_bytes
        assert row.peak_bytes > row.kept_bytes
    # five chunk ends in bf16, two recurrences in fp32
    assert of["rat"].cache_bytes == of["rat_masked"].cache_bytes == 2 * 2 * 5 * 16 + 4 * 2 * 16
    assert of["rat_masked"].kept_bytes > of["rat"].kept_bytes
    written = json.loads((tmp_path / "memory.json").read_text())
    assert [row["kept_bytes"] for row in written["rows"]] == [row.kept_bytes for row in table]
    assert written["complete"] is True
    assert matplotlib.image.imread(tmp_path / "memory.png").std() > 0.05
    assert capsys.readouterr().out.count("  rat_masked ") == 2


def test_what_does_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Attention, "forward", full)
    monkeypatch.setattr(contenders, "available_bytes", lambda device: 10_000)
    table = memory.memory_benchmark([64], ["attention", "rat", "rat_masked"], output=tmp_path, **SMALL)
    assert table[0].skipped == "out of memory"
    assert table[1].kept_bytes is not None
    assert table[1].kept_ratio is None, "there is no yardstick"
    assert (table[2].skipped or "").startswith("its mask and scores would take")
    assert "skipped: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ["lstm"]}, "unknown mixer 'lstm': choose from"),
        ({"seq_lens": [-1]}, "seq_lens must be at least 1"),
        ({"device": "nowhere"}, "there is no device 'nowhere' here"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        memory.memory_benchmark(output=tmp_path, **SMALL | options)
    assert not list(tmp_path.iterdir())
