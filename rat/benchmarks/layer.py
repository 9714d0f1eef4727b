"""Single layers, timed: training, prefill and decoding, side by side, and how far each is from its floor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.benchmark import Measurement

from rat.benchmarks.contenders import Contender, backend_of, kept_for_backward, layer_config, make_layer, too_large
from rat.benchmarks.floors import Mode, work
from rat.benchmarks.footprint import is_out_of_memory
from rat.benchmarks.masked import MaskedRAT
from rat.benchmarks.options import Dtype, one_of, place, positive, precision
from rat.benchmarks.provenance import machine
from rat.benchmarks.report import Report, Row, plot_lines
from rat.benchmarks.steps import Step, make_step
from rat.benchmarks.timing import Rates, interleaved, measure_rates
from rat.layers import Mixer
from rat.ops import Backend, use_backend
from rat.ops.backend import describe_backend


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """One cell: one contender in one mode at one length. Times are None where it was skipped."""

    mode: Mode
    seq_len: int
    contender: str
    milliseconds: float | None = None  # median
    iqr_milliseconds: float | None = None  # distance of the quartiles
    speedup: float | None = None  # against the first contender
    floor_milliseconds: float
    floor_limit: str  # arithmetic or bytes
    times_floor: float | None = None  # measured over floor
    kept_bytes: int | None = None  # for the backward; train only
    seconds: list[float] = field(default_factory=list)  # of every round
    skipped: str | None = None  # why


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The time of a token in a longer row, as a multiple of that in the shortest one."""

    contender: str
    seq_len: int
    measured: float
    predicted: float  # by the FLOPs of the cost model


def layer_benchmark(
    seq_lens: Sequence[int] = (1024, 4096, 32768),
    mixers: Sequence[Contender] = ("attention", "rat", "rat_masked"),
    modes: Sequence[Mode] = ("train", "prefill", "decode"),
    d_model: int = 512,
    d_head: int = 128,
    chunk_size: int = 16,
    num_groups: int = 2,
    window_size: int = 1024,
    batch_size: int = 1,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    repeats: int = 5,
    device: str = "cpu",
    output: Path | None = None,
) -> list[LayerTiming]:
    """Time single layers that take turns; print a table, write layer.json and draw layer.png.

    Modes: `train` is a forward and a backward pass, `prefill` a prompt of T tokens into an empty decoding state,
    `decode` one more token for each row of a batch that stands at position T (random numbers for what it has seen).

    Floors: the FLOPs of the cost model at the rate of a matrix product (on a CPU the higher of dtype's and fp32's), or
    every input read and every output written once at the rate of a copy, all measured in the same run; the larger one
    is the floor.

    Args:
        seq_lens: T of each row of the table, in tokens.
        mixers: the layers to compare; the first is the yardstick. `attention` is always PyTorch's own
            scaled_dot_product_attention, whatever the backend. `rat_masked` and `rat_sdpa` are RAT without the
            identity that makes it fast: scores of all tokens and chunk ends under a mask, or one masked call of
            PyTorch's attention on chunk ends and own tokens.
        modes: what to do with them.
        d_model: D.
        d_head: d; a layer has D / d heads.
        chunk_size: L of RAT.
        num_groups: G of RAT.
        window_size: W of the sliding window.
        batch_size: rows of T tokens; in decode, rows that take a token.
        dtype: of weights, activations and caches.
        backend: which implementation of `rat.ops` runs.
        repeats: rounds whose median is taken, after one that warms up.
        device: cpu, cuda or cuda:N.
        output: folder of the results; default: runs/bench/layer/ and the time.

    Returns:
        The cells of the table.

    Raises:
        ValueError: an unknown name, a number below 1, sizes that do not fit, no such device, a backend that cannot run.
    """
    options = dict(locals())
    where, kind = place(device), precision(dtype)
    one_of("mode", modes, get_args(Mode))
    positive(seq_lens=seq_lens, batch_size=batch_size, repeats=repeats)
    seq_lens = list(dict.fromkeys(seq_lens))
    config = layer_config(
        mixers, d_model=d_model, d_head=d_head, chunk_size=chunk_size, num_groups=num_groups, window_size=window_size
    )
    explained = describe_backend(backend, where, "train" in modes)
    with Report("layer", output, options, where) as report:
        layers: dict[str, Mixer] = {name: make_layer(name, config, kind, where) for name in mixers}
        print(f"{machine(where)}; {explained}", flush=True)
        rates = measure_rates(kind, where)
        report.rates(rates)
        sizes = f"D {d_model}, d {d_head}, L {chunk_size}, G {num_groups}, W {window_size}, batch {batch_size}"
        print(f"{dtype}, {sizes}; {rates}; medians of {repeats} interleaved rounds")
        race = _Race(layers=layers, batch_size=batch_size, backend=backend, repeats=repeats, device=where, rates=rates)
        table: list[LayerTiming] = []
        report.picture(lambda figure: _draw(figure, table, modes), (5.0 * len(modes), 4.2))
        for mode in modes:
            print(_header(mode), flush=True)
            for seq_len in seq_lens:
                for cell in race.cells(mode, seq_len):
                    table.append(cell)
                    report.put("rows", table)
                    print(_line(cell), flush=True)
        if len(seq_lens) > 1 and "train" in modes:
            grown = list(growth(table, layers))
            report.put("growth", grown)
            print("\n".join(_growth_lines(grown)), flush=True)
    return table


@dataclass(frozen=True, kw_only=True)
class _Race:
    """The layers of a call, and what all of its cells have in common."""

    layers: Mapping[str, Mixer]
    batch_size: int
    backend: Backend
    repeats: int
    device: torch.device
    rates: Rates

    def cells(self, mode: Mode, seq_len: int) -> Iterator[LayerTiming]:
        """Time every contender in one mode at one length."""
        steps: dict[str, Step] = {}
        skipped: dict[str, str] = {}
        for name, layer in self.layers.items():
            reason = _why_not(layer, mode, self.batch_size, seq_len, self.device)
            if reason:
                skipped[name] = reason
            else:
                backend = backend_of(name, self.backend)
                with _noting_full_memory(name, skipped):
                    steps[name] = _guarded(name, backend, make_step(layer, mode, self.batch_size, seq_len), skipped)
        measured = interleaved(steps, self.repeats, self.device, f"{mode}, T {seq_len}")
        measured = {name: time for name, time in measured.items() if name not in skipped}
        for name in self.layers:
            yield self._cell(name, mode, seq_len, measured, skipped.get(name))

    def _cell(
        self, name: str, mode: Mode, seq_len: int, measured: Mapping[str, Measurement], skipped: str | None
    ) -> LayerTiming:
        layer = self.layers[name]
        floor = work(layer, mode, self.batch_size, seq_len).floor(self.rates)
        common: Any = {"mode": mode, "seq_len": seq_len, "contender": name}
        common |= {"floor_milliseconds": 1e3 * floor.seconds, "floor_limit": floor.limit}
        if skipped:
            return LayerTiming(**common, skipped=skipped)
        time, yardstick = measured[name], measured.get(next(iter(self.layers)))
        return LayerTiming(
            **common,
            milliseconds=1e3 * time.median,
            iqr_milliseconds=1e3 * time.iqr,
            speedup=yardstick.median / time.median if yardstick else None,
            times_floor=time.median / floor.seconds,
            kept_bytes=self._kept(name, seq_len) if mode == "train" else None,
            seconds=list(time.times),
        )

    def _kept(self, name: str, seq_len: int) -> int:
        with use_backend(backend_of(name, self.backend)):
            return kept_for_backward(self.layers[name], self.batch_size, seq_len)


def _why_not(layer: Mixer, mode: Mode, batch_size: int, seq_len: int, device: torch.device) -> str | None:
    if isinstance(layer, MaskedRAT) and mode == "decode":
        return "a single token has nothing to mask: it decodes as rat does"
    return too_large(layer, batch_size, seq_len, mode == "train", device)


def _guarded(name: str, backend: Backend, step: Step, skipped: dict[str, str]) -> Step:
    """`step` on its backend; once memory does not suffice for it, it is entered in `skipped` and does nothing."""

    def run() -> None:
        if name not in skipped:
            with _noting_full_memory(name, skipped), use_backend(backend):
                step()

    return run


@contextmanager
def _noting_full_memory(name: str, skipped: dict[str, str]) -> Iterator[None]:
    """Enter `name` in `skipped` where memory does not suffice for the `with` block, and go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        skipped[name] = "out of memory"


def growth(table: Sequence[LayerTiming], layers: Mapping[str, Mixer]) -> Iterator[Growth]:
    """How the train step's time per token grows with T, and how the cost model says that it does."""
    for name, layer in layers.items():
        cells = [cell for cell in table if cell.mode == "train" and cell.contender == name and cell.milliseconds]
        cells.sort(key=lambda cell: cell.seq_len)
        for cell in cells[1:]:
            first = cells[0]
            assert cell.milliseconds is not None
            assert first.milliseconds is not None
            yield Growth(
                contender=name,
                seq_len=cell.seq_len,
                measured=(cell.milliseconds / cell.seq_len) / (first.milliseconds / first.seq_len),
                predicted=layer.flops_per_token(cell.seq_len) / layer.flops_per_token(first.seq_len),
            )


def _header(mode: Mode) -> str:
    place_of = {"train": "forward and backward", "prefill": "a prompt of T", "decode": "a token a row at position T"}
    kept = f"{'kept MB':>10}" if mode == "train" else ""
    columns = f"{'ms':>10}{'IQR':>9}{'speedup':>9}{'floor ms':>10}  {'set by':<11}{'ms/floor':>8}{kept}"
    return f"\n{mode}: {place_of[mode]}\n{'T':>7}  {'layer':<16}{columns}"


def _line(cell: LayerTiming) -> str:
    start = f"{cell.seq_len:>7}  {cell.contender:<16}"
    if cell.milliseconds is None:
        return f"{start}  skipped: {cell.skipped}"
    speedup = f"{cell.speedup:.2f}x" if cell.speedup else ""
    kept = "" if cell.kept_bytes is None else f"{cell.kept_bytes / 1e6:>10.1f}"
    return (
        f"{start}{cell.milliseconds:>10.3f}{cell.iqr_milliseconds:>9.3f}{speedup:>9}"
        f"{cell.floor_milliseconds:>10.3f}  {cell.floor_limit:<11}{cell.times_floor:>8.2f}{kept}"
    )


def _growth_lines(grown: Sequence[Growth]) -> Iterator[str]:
    yield "\ngrowth: time of a token of the train step, as a multiple of that at the shortest T"
    yield f"{'T':>7}  {'layer':<16}{'measured':>10}{'cost model':>12}{'ratio':>9}"
    for row in grown:
        ratio = row.measured / row.predicted
        yield f"{row.seq_len:>7}  {row.contender:<16}{row.measured:>10.2f}{row.predicted:>12.2f}{ratio:>9.2f}"


def _draw(figure: Any, table: Sequence[LayerTiming], modes: Sequence[Mode]) -> None:
    """Latency over T, a panel a mode, a line a contender, as in the paper's figure."""
    titles = {"train": "train step", "prefill": "prefill of T tokens", "decode": "decoding at position T"}
    for number, mode in enumerate(modes, 1):
        rows: list[Row] = [vars(cell) for cell in table if cell.mode == mode]
        if rows:
            ax = figure.add_subplot(1, len(modes), number)
            floor = "floor_milliseconds"
            plot_lines(ax, rows, "milliseconds", title=titles[mode], ylabel="milliseconds (dotted: floor)", floor=floor)
