"""Where the results go: JSON that is whole at any moment, and a picture."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from rat.benchmarks.provenance import code_version, machine_facts
from rat.benchmarks.timing import Rates

Row = Mapping[str, Any]
# One look for a contender in every picture: the two that everything is about first.
_COLORS = {
    "attention": "#d9722e",
    "rat": "#2a7f9e",
    "sliding_window": "#8c6bb1",
    "rnn": "#6a9a3d",
    "rat_masked": "#7fb3c8",
    "rat_sdpa": "#a9c9d6",
}


class Report:
    """The results of one call, in `folder`/`name`.json from its first row on.

    The file holds `benchmark`, `options`, `machine`, `code` (package, commit, dirty), `rates` (where measured),
    `complete` (false while it runs, and after an interruption) and lists of rows. It is replaced in one go, so that
    whoever reads it, at whatever moment, reads all of a state of it. Use as a context manager: leaving it tells where
    everything is.

    Args:
        name: of the benchmark.
        folder: made if needed; default: runs/bench/`name`/ and the time.
        options: what the benchmark was called with.
        device: it runs on.
    """

    def __init__(self, name: str, folder: Path | None, options: Mapping[str, Any], device: torch.device) -> None:
        self.name = name
        self.folder = folder or Path("runs", "bench", name, datetime.now().strftime("%Y%m%d-%H%M%S"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._content: dict[str, Any] = {"benchmark": name, "options": dict(options)}
        self._content |= {"machine": machine_facts(device), "code": code_version()}
        self._content |= {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "complete": False}
        self._draw: Callable[[Any], None] | None = None
        self._size = (7.0, 4.0)

    @property
    def path(self) -> Path:
        """Of the JSON file; the picture lies beside it."""
        return self.folder / f"{self.name}.json"

    def rates(self, rates: Rates) -> None:
        """Keep the rates that the machine has reached."""
        self._content["rates"] = rates._asdict()

    def put(self, key: str, rows: Sequence[Any]) -> None:
        """Keep the rows (mappings or dataclasses) of a table as they are now, in place of what was there."""
        self._content[key] = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in rows]
        _replace(self.path, lambda path: path.write_text(json.dumps(self._content, indent=1, default=str) + "\n"))

    def picture(self, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
        """How to draw what there is, on a matplotlib figure of so many inches; done when the report is left."""
        self._draw, self._size = draw, size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._content["complete"] = error is None
        self.put("rows", self._content.get("rows", []))
        if not self._content["rows"]:
            return
        if self._draw is not None:
            self._save_picture(self._draw)
        sys.stdout.flush()
        print(f"\n{'results' if error is None else 'interrupted; the finished rows are'} in {self.path}", flush=True)

    def _save_picture(self, draw: Callable[[Any], None]) -> None:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=self._size, layout="constrained")
        draw(figure)
        _replace(self.path.with_suffix(".png"), lambda path: figure.savefig(path, dpi=150, format="png"))
        plt.close(figure)


def plot_lines(ax: Any, rows: Sequence[Row], y: str, *, title: str, ylabel: str, floor: str | None = None) -> None:
    """A line for each contender over T on log-log axes, and a dotted one for its floor where there is one."""
    from matplotlib.ticker import NullFormatter

    for depth, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
        mine = [row for row in rows if row["contender"] == name and row[y] is not None]
        lengths = [row["seq_len"] for row in mine]
        if mine:
            look: Any = {"color": color(name), "zorder": 3 - depth / 100}  # the first lies on top
            ax.plot(lengths, [row[y] for row in mine], marker="o", markersize=4, label=name, **look)
            if floor is not None:
                ax.plot(lengths, [row[floor] for row in mine], linestyle=":", linewidth=1, **look)
    ticks = sorted({row["seq_len"] for row in rows})
    ax.set(xscale="log", yscale="log", title=title, xlabel="T, tokens", ylabel=ylabel)
    ax.set_xticks(ticks, [tokens(length) for length in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    plain_log_axis(ax.yaxis)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")


def plain_log_axis(axis: Any) -> None:
    """Marks at 1, 2, 5, 10, 20, ... of a logarithmic axis, written out: 2,000 instead of 2 x 10^3. Where what is drawn
    spans less than a decade, there are more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.set_major_formatter(lambda y, _: f"{y:,g}")
    axis.set_minor_formatter(NullFormatter())


def color(contender: str) -> str | None:
    """Of a contender's line or bar; matplotlib's choice for one that has no colour of its own."""
    return _COLORS.get(contender)


def tokens(count: int) -> str:
    """A number of tokens in short: 4096 is 4K."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, which then takes its place."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
