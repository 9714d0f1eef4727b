"""What a layer needs to remember: for its backward, at the height of a train step, and while it decodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rat.benchmarks.contenders import Contender, backend_of, kept_for_backward, layer_config, make_layer, too_large
from rat.benchmarks.footprint import is_out_of_memory, peak_bytes
from rat.benchmarks.options import Dtype, place, positive, precision
from rat.benchmarks.provenance import machine
from rat.benchmarks.report import Report, Row, plot_lines
from rat.benchmarks.steps import make_step
from rat.layers import Mixer
from rat.ops import Backend, use_backend
from rat.ops.backend import describe_backend


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """One contender at one length. Bytes are None where it was skipped; ratios are against the first contender."""

    seq_len: int
    contender: str
    kept_bytes: int | None = None  # for the backward, the layer's input included once, no weights
    kept_ratio: float | None = None
    peak_bytes: int | None = None  # of a train step, with weights, input and gradients
    peak_ratio: float | None = None
    cache_bytes: int | None = None  # of the decoding state of one row
    cache_ratio: float | None = None
    skipped: str | None = None  # why


def memory_benchmark(
    seq_lens: Sequence[int] = (1024, 4096, 16384),
    mixers: Sequence[Contender] = ("attention", "rat", "sliding_window", "rnn", "rat_masked"),
    d_model: int = 512,
    d_head: int = 128,
    chunk_size: int = 16,
    num_groups: int = 2,
    window_size: int = 1024,
    batch_size: int = 1,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    device: str = "cpu",
    output: Path | None = None,
) -> list[LayerMemory]:
    """Count the bytes of single layers; print a table, write memory.json and draw memory.png.

    `kept` is what autograd keeps of a forward pass: whole storages, each once, the layer's input included (once),
    weights not. `peak` is the most that a train step holds at a time, by the allocator's record: weights, input and
    gradient of the output, which are there before, and what the step makes. `cache` is the decoding state of a row.

    Args:
        seq_lens: T, in tokens.
        mixers: the layers to compare; the first is the yardstick. `attention` is always PyTorch's own; `rat_masked`
            and `rat_sdpa` are RAT with a mask, see bench layer.
        d_model: D.
        d_head: d; a layer has D / d heads.
        chunk_size: L of RAT.
        num_groups: G of RAT.
        window_size: W of the sliding window.
        batch_size: rows of T tokens, except for the cache.
        dtype: of weights, activations and caches.
        backend: which implementation of `rat.ops` runs.
        device: cpu, cuda or cuda:N.
        output: folder of the results; default: runs/bench/memory/ and the time.

    Returns:
        The rows of the table.

    Raises:
        ValueError: an unknown name, a number below 1, sizes that do not fit, no such device, a backend that cannot run.
    """
    options = dict(locals())
    where, kind = place(device), precision(dtype)
    positive(seq_lens=seq_lens, batch_size=batch_size)
    config = layer_config(
        mixers, d_model=d_model, d_head=d_head, chunk_size=chunk_size, num_groups=num_groups, window_size=window_size
    )
    explained = describe_backend(backend, where, training=True)
    with Report("memory", output, options, where) as report:
        table: list[LayerMemory] = []
        report.picture(lambda figure: _draw(figure, table), (15.0, 4.2))
        print(f"{machine(where)}; {explained}")
        print(f"{dtype}, D {d_model}, d {d_head}, L {chunk_size}, G {num_groups}, W {window_size}, batch {batch_size}")
        print("MB of one layer; x: of the first layer's. The input counts as kept, once; weights do not.")
        print(f"{'T':>7}  {'layer':<16}{'kept':>10}{'x':>7}{'train peak':>12}{'x':>7}{'cache of a row':>16}{'x':>7}")
        for seq_len in seq_lens:
            first: dict[str, Any] = {}
            for name in mixers:
                layer = make_layer(name, config, kind, where)
                found = _count(name, layer, backend_of(name, backend), batch_size, seq_len)
                first = first or found
                row = LayerMemory(seq_len=seq_len, contender=name, **found, **_ratios(found, first))
                table.append(row)
                report.put("rows", table)
                print(_line(row), flush=True)
    return table


def _count(name: str, layer: Mixer, backend: Backend, batch_size: int, seq_len: int) -> dict[str, Any]:
    """The bytes of a contender, or why there are none."""
    weight = layer.in_proj.weight
    reason = too_large(layer, batch_size, seq_len, True, weight.device)
    if reason:
        return {"skipped": reason}
    activation = batch_size * seq_len * layer.d_model * weight.element_size()
    before = sum(p.nbytes for p in layer.parameters()) + 2 * activation
    try:
        with use_backend(backend):
            return {
                "kept_bytes": kept_for_backward(layer, batch_size, seq_len),
                "peak_bytes": before + peak_bytes(make_step(layer, "train", batch_size, seq_len), weight.device),
                "cache_bytes": layer.new_state(1, seq_len).num_bytes(),
            }
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"skipped": "out of memory"}


def _ratios(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    names = {"kept_bytes": "kept_ratio", "peak_bytes": "peak_ratio", "cache_bytes": "cache_ratio"}
    return {ratio: found[key] / first[key] for key, ratio in names.items() if key in found and key in first}


def _line(row: LayerMemory) -> str:
    start = f"{row.seq_len:>7}  {row.contender:<16}"
    if row.kept_bytes is None or row.peak_bytes is None or row.cache_bytes is None:
        return f"{start}  skipped: {row.skipped}"
    columns = ((row.kept_bytes, row.kept_ratio), (row.peak_bytes, row.peak_ratio), (row.cache_bytes, row.cache_ratio))
    for (count, ratio), width in zip(columns, (10, 12, 16), strict=True):
        start += f"{count / 1e6:>{width}.2f}" + (f"{ratio:>7.2f}" if ratio is not None else f"{'':>7}")
    return start


def _draw(figure: Any, table: Sequence[LayerMemory]) -> None:
    """Megabytes over T: kept for the backward, peak of a train step, decoding state."""
    panels = {
        "kept_bytes": "kept for the backward",
        "peak_bytes": "peak of a train step",
        "cache_bytes": "decoding state of a row",
    }
    for number, (key, title) in enumerate(panels.items(), 1):
        rows: list[Row] = [vars(row) | {"megabytes": None if row.skipped else vars(row)[key] / 1e6} for row in table]
        plot_lines(figure.add_subplot(1, 3, number), rows, "megabytes", title=title, ylabel="MB")
