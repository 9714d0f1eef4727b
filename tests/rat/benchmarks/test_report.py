"""Results on disk: whole at any moment, where they were asked for, with a picture."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch

from rat.benchmarks.report import Report, plain_log_axis, plot_lines, tokens

CPU = torch.device("cpu")


@dataclass
class Row:
    seq_len: int
    contender: str
    milliseconds: float | None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("layer", tmp_path, {}, CPU)
    report.put("rows", [Row(8, "rat", 1.5)])
    before = report.path.read_text()
    write = Path.write_text

    def half(self: Path, text: str) -> int:
        write(self, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        report.put("rows", [Row(8, "rat", 1.5), Row(16, "rat", 2.5)])
    assert report.path.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["layer.json"]
    assert json.loads(before)["rows"] == [{"seq_len": 8, "contender": "rat", "milliseconds": 1.5}]
    assert json.loads(before)["complete"] is False


def test_a_reader_keeps_the_file_that_it_has_opened(tmp_path: Path) -> None:
    report = Report("layer", tmp_path, {}, CPU)
    report.put("rows", [Row(8, "rat", 1.5)])
    with report.path.open() as file:
        report.put("rows", [])
        assert len(json.load(file)["rows"]) == 1


def test_runs_that_name_no_folder_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report("memory", None, {}, CPU)
    assert report.folder.parent == Path("runs", "bench", "memory")
    assert report.folder.name[:2] == "20"


def test_the_picture_has_a_line_for_each_contender_that_has_points(tmp_path: Path) -> None:
    rows = [Row(1024, "attention", 4), Row(4096, "attention", 16), Row(1024, "rat", 2), Row(1024, "rat_sdpa", None)]
    drawn: list[Any] = []

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        plot_lines(ax, [vars(row) for row in rows], "milliseconds", title="train", ylabel="ms")
        drawn.append(ax)

    with Report("layer", tmp_path, {}, CPU) as report:
        report.picture(draw, (4, 3))
        report.put("rows", rows)
    (ax,) = drawn
    assert {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()} == {"attention": [4, 16], "rat": [2]}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1K", "4K"]
    assert matplotlib.image.imread(tmp_path / "layer.png").shape[:2] == (450, 600)
    assert json.loads(report.path.read_text())["complete"] is True


def test_nothing_measured_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ValueError), Report("layer", tmp_path, {}, CPU) as report:
        report.picture(lambda figure: figure.add_subplot(), (4, 3))
        raise ValueError("early")
    assert [path.name for path in tmp_path.iterdir()] == ["layer.json"]
    assert capsys.readouterr().out == ""


def test_lengths_are_short() -> None:
    assert [tokens(length) for length in (1024, 65536, 1000)] == ["1K", "64K", "1000"]


@pytest.mark.parametrize("high", [9_000, 17_000, 60_000, 3_000_000])
def test_a_logarithmic_axis_has_marks_to_read_by(high: int) -> None:
    figure, ax = plt.subplots()
    ax.plot([1, 2], [5_200, high])
    ax.set_yscale("log")
    plain_log_axis(ax.yaxis)
    figure.canvas.draw()
    low, top = ax.get_ylim()
    seen = [label.get_text() for label in ax.get_yticklabels() if low <= label.get_position()[1] <= top]
    assert 3 <= len(seen) <= 12
    assert "10,000" in seen or high < 10_000
    plt.close(figure)
