"""The figures of notebooks, pages and commands, and the numbers that they are drawn from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from datamodules.synthetic import Recall
from rat import CausalLM
from rat.benchmarks.report import color, plain_log_axis, plot_lines
from rat.layers import GatedMixer
from rat.layers.rat import RAT
from rat_cli.sweep_results import read_curves

GUESSED_DIGIT = 0.1  # the accuracy of who answers a needle with any digits
FEW = 50  # answers of a run: an accuracy of fewer says little
Chance = float | Mapping[int, float] | None

STYLE = {
    "figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "font.size": 11,
}  # fmt: skip


def use_style() -> None:
    """Draw everything alike from here on."""
    plt.rcParams.update(STYLE)


def look(variant: str) -> dict[str, Any]:
    """Colour, line and marker of a variant: a colour for each backbone, dashes for hybrids, darker for larger L, dots
    and hollow markers without positions."""
    if variant.endswith("-nope"):
        return look(variant.removesuffix("-nope")) | {"linestyle": ":", "markerfacecolor": "none"}
    backbone, _, size = variant.partition("-")
    if re.fullmatch(r"L[1-9]\d*", size):
        shade = min(1.0, 0.3 + 0.7 * np.log2(int(size[1:])) / 9)
        return {"color": plt.get_cmap("Blues")(shade), "marker": "o", "markersize": 4}
    style = {"linestyle": "--", "marker": "s"} if size == "swa" else {"marker": "^" if backbone == "rnn" else "D"}
    return {"color": color(backbone), "markersize": 4, **style}


def trained_length(records: Path) -> int:
    """T of training of a sweep's runs."""
    config = yaml.safe_load(min(records.glob("*/config.yaml")).read_text())
    return config["data"]["init_args"]["seq_len"]


def layer_speed(rows: pd.DataFrame) -> pd.DataFrame:
    """Tokens/s from rows of `Setting.bench` with the layers attention, rat, sliding_window and rnn, for every call.

    Hybrids are the mean of their two layers' times, that of RAT with the L of the ablation's, 16. In a call layers take
    turns, so that all are as much faster or slower as the machine is at the time: what is told is how many times as
    fast as attention they are in their call, times the median speed of attention.

    Returns:
        Columns mode, seq_len, chunk_size, variant, pattern and tokens_per_second; training comes first.
    """
    keys = ["call", "mode", "seq_len", "chunk_size", "batch_size"]
    times = rows.pivot(index=keys, columns="contender", values="milliseconds").reset_index()
    slower = times.attention / times.groupby(["mode", "seq_len", "batch_size"]).attention.transform("median")
    layers = [name for name in times.columns if name not in keys]
    times[layers] = times[layers].div(slower, axis=0)
    with_windows = times[times.chunk_size == 16]
    parts = [
        times.assign(variant="rat-L" + times.chunk_size.astype(str), pattern="rat", time=times.rat),
        times.assign(variant="attention", pattern="attention", time=times.attention),
        times.assign(variant="rnn", pattern="rnn", time=times.rnn),
        with_windows.assign(
            variant="rat-swa", pattern="rat sliding_window", time=(with_windows.rat + with_windows.sliding_window) / 2
        ),
        times.assign(
            variant="attention-swa",
            pattern="attention sliding_window",
            time=(times.attention + times.sliding_window) / 2,
        ),
    ]
    found = pd.concat(parts, ignore_index=True)
    tokens = found.batch_size * found.seq_len.where(found["mode"] != "decode", 1)
    speed = found.assign(tokens_per_second=1000 * tokens / found.time).sort_values(
        ["mode", "seq_len"], ascending=[False, True], kind="stable"
    )
    return speed[["mode", "seq_len", "chunk_size", "variant", "pattern", "tokens_per_second"]]


def over_seeds(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """`mean` and standard deviation `std` (0 where there is one) of a column over all else that is not in `keys`."""
    found = table.groupby(list(keys), sort=False)[value].agg(["mean", "std", "count"]).reset_index()
    return found.assign(std=found["std"].fillna(0.0))


def against_chunk_size(ax: Axes, table: pd.DataFrame, value: str, ylabel: str, *, log: bool = False) -> None:
    """A column against L of the pure RAT variants, error bars of one standard deviation; the others as lines across.

    Args:
        ax: what is drawn on.
        table: a row a run, with variant, pattern ("rat", "rat sliding_window", ...), chunk_size and the column.
        value: the column.
        ylabel: what it is, with its unit.
        log: a logarithmic axis for it.
    """
    pure = table[table.pattern == "rat"]
    points = over_seeds(pure, ["chunk_size"], value).sort_values("chunk_size")
    style = {"color": color("rat"), "marker": "o", "capsize": 3, "label": "RAT", "zorder": 3}
    ax.errorbar(points.chunk_size, points["mean"], yerr=points["std"], **style)
    for row in over_seeds(table[table.pattern != "rat"], ["variant"], value).itertuples():
        line = {key: x for key, x in look(row.variant).items() if not key.startswith("marker")}
        ax.axhline(row.mean, label=row.variant, **{"linestyle": "-", "linewidth": 1.2, **line})
        ax.axhspan(row.mean - row.std, row.mean + row.std, color=line["color"], alpha=0.12, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(points.chunk_size, [f"{size}" for size in points.chunk_size])
    ax.set(xlabel="chunk size L, tokens", ylabel=ylabel, yscale="log" if log else "linear")
    if log:
        plain_log_axis(ax.yaxis)
    else:
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")


def by_position(
    ax: Axes, positions: pd.DataFrame, trained: Sequence[int], *, perplexity: bool = False, since: int = 1
) -> None:
    """Loss against the tokens read before, a line for each variant, its mean over seeds; `trained` marks every T.

    A band is the 95 % interval of a variant's loss over texts. Where variants have seeds there is none: all read the
    same texts, so that lines differ by less than bands would say.

    Args:
        ax: what is drawn on.
        positions: of `rat_cli.sweep_results.read_positions`; seed may be missing.
        trained: the T of training.
        perplexity: draw e to the loss, on a logarithmic axis.
        since: leave out spans that begin before this position.
    """
    for variant, rows in positions[positions["first"] >= since].groupby("variant", sort=False):
        means = over_seeds(rows, ["first", "last"], "loss").sort_values("first")
        middle = np.sqrt(means["first"] * means["last"])  # the mean of a span stands in its middle
        values = np.exp(means["mean"]) if perplexity else means["mean"]
        of_sweep = "seed" in rows
        (line,) = ax.plot(middle, values, label=variant, **look(str(variant)) if of_sweep else {"marker": "."})
        if not of_sweep:
            within = rows.sort_values("first").within.astype(float).fillna(0.0).to_numpy()
            ax.fill_between(middle, values - within, values + within, color=line.get_color(), alpha=0.15, linewidth=0)
    place = {"transform": ax.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "top"}
    for length in trained:
        ax.axvline(length, color="black", linestyle=":", linewidth=1)
        ax.text(length, 0.98, f"trained at {length:,}", fontsize=9, **place)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set(xlabel="tokens read before", ylabel="loss, nats per token")
    if perplexity:
        ax.set(ylabel="perplexity (log)", yscale="log")
        plain_log_axis(ax.yaxis)


def loss_between(positions: pd.DataFrame, after: int, upto: int) -> "pd.Series[float]":
    """Mean loss of each variant over the positions above `after` and at most `upto`, in whole spans."""
    chosen = positions[(positions["first"] > after) & (positions["last"] <= upto)]
    width = chosen["last"] - chosen["first"] + 1
    total = (chosen.loss * width).groupby(chosen.variant, sort=False).sum()
    return total / width.groupby(chosen.variant, sort=False).sum()


def accuracies(curves: pd.DataFrame, number: str) -> pd.DataFrame:
    """The last accuracies by a number (distance or items) of every run: run, variant, seed, upto, accuracy.

    `upto` is the end of an octave: answers of a number above upto / 2 and at most upto.
    """
    prefix = f"val/accuracy_by_{number}/"
    found = curves[curves.tag.str.startswith(prefix)].sort_values("step", kind="stable")
    last = found.groupby(["run", "variant", "seed", "tag"], sort=False).value.last().reset_index(name="accuracy")
    return last.assign(upto=last.tag.str.removeprefix(prefix).astype(int)).drop(columns="tag")


def by_octave(ax: Axes, table: pd.DataFrame, xlabel: str, chance: Chance = None) -> None:
    """Accuracies of `accuracies` by octave: a line for each variant, bars from the least of its seeds to the most.

    Args:
        ax: what is drawn on.
        table: of `accuracies`.
        xlabel: what the octaves are of.
        chance: what guessing gets, everywhere or by octave.
    """
    for variant, rows in table.groupby("variant", sort=False):
        seeds = rows.groupby("upto").accuracy.agg(["mean", "min", "max"]).reset_index()
        bars = [seeds["mean"] - seeds["min"], seeds["max"] - seeds["mean"]]
        ax.errorbar(seeds.upto, seeds["mean"], yerr=bars, label=variant, capsize=2, **look(variant))
    ticks = sorted(table.upto.unique())
    if chance is not None:
        levels = [chance[upto] if isinstance(chance, Mapping) else chance for upto in ticks]
        ax.plot(ticks, levels, color="black", linestyle=":", linewidth=1, label="guessing")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [octave(upto) for upto in ticks], rotation=30)
    ax.set(xlabel=xlabel, ylabel="accuracy of answers", ylim=(-0.02, 1.04))


def while_training(ax: Axes, curves: pd.DataFrame, tag: str, title: str) -> None:
    """An accuracy against the steps of training, a line for each variant, its mean over seeds."""
    for variant, rows in curves[curves.tag == tag].groupby("variant", sort=False):
        means = over_seeds(rows, ["step"], "value")
        ax.plot(means.step, means["mean"], label=variant, **look(str(variant)))
    ax.set(xlabel="optimiser step", ylabel="accuracy", ylim=(-0.02, 1.04), title=title)


def steps_to(curves: pd.DataFrame, tag: str, level: float) -> str:
    """After how many steps of training each run's accuracy was first as high: 'rat 300, 450, never'; in the order of
    their medians."""
    found = {}
    for variant, rows in curves[curves.tag == tag].groupby("variant", sort=False):
        firsts = rows[rows.value >= level].groupby("seed").step.min() + 1  # steps are counted from 0
        found[variant] = sorted(firsts.reindex(rows.seed.unique()).fillna(np.inf))
    words = {
        variant: ", ".join(f"{step:,.0f}" if np.isfinite(step) else "never" for step in steps)
        for variant, steps in sorted(found.items(), key=lambda item: (median_high(item[1]), item[1]))
    }
    return "; ".join(f"{variant} {said}" for variant, said in words.items())


def guessing(records: Path, number: str, samples: int = 2000) -> dict[int, float]:
    """The accuracy by octave of a number (distance or items) of who has learned only which values there are. Octaves
    with fewer than FEW answers in a validation are left out.

    Args:
        records: of a sweep of recall, whose samples with n pairs are so answered with 1 of n right.
        number: distance or items.
        samples: to draw.
    """
    given = yaml.safe_load(min(records.glob("*/config.yaml")).read_text())["data"]["init_args"]
    task = Recall(**given["task"]["init_args"])
    right: dict[int, list[float]] = {}
    for sample in (task.sample(0, "val", i, given["seq_len"]) for i in range(samples)):
        for distance in sample.distance[sample.distance > 0].tolist():
            upto = 1 << (({"distance": distance, "items": sample.items}[number]) - 1).bit_length()
            right.setdefault(upto, []).append(1 / sample.items)
    least = FEW * samples / given["val_samples"]
    return {upto: float(np.mean(shares)) for upto, shares in sorted(right.items()) if len(shares) >= least}


def recalled(records: Path, number: str) -> tuple[pd.DataFrame, dict[int, float]]:
    """`accuracies` of a sweep of recall and `guessing` beside them, both without octaves of few answers."""
    table, chance = accuracies(read_curves(records), number), guessing(records, number)
    return table[table.upto.isin(chance)], chance


def remembered(table: pd.DataFrame, chance: Chance) -> str:
    """How each variant's accuracy goes from the first octave of `accuracies` to the last, by what that is called.

    Accuracies that differ by less than the standard deviation over seeds, or by a few hundredths, are called the same.
    """
    first, last = table.upto.min(), table.upto.max()
    guessed = chance[last] if isinstance(chance, Mapping) else chance or 0.0
    means = over_seeds(table, ["variant", "upto"], "accuracy").set_index(["variant", "upto"])
    ends = [means.xs(upto, level="upto") for upto in (first, last)]
    parts: dict[str, list[str]] = {}
    for variant in ends[1].sort_values("mean", ascending=False).index:
        near, far = (end["mean"].get(variant, np.nan) for end in ends)
        spread = ends[1]["std"][variant]
        if far >= 0.9:
            said = "holds"
        elif spread > 0.2:
            said = "depends on the seed"
        elif far < guessed + max(0.02, spread):
            said = "is guessed"
        else:
            said = "degrades" if near - far > max(0.05, spread) else "is level"
        parts.setdefault(said, []).append(f"{variant} {near:.2f} → {far:.2f} ± {spread:.2f}")
    return "; ".join(f"it {said} in {', '.join(variants)}" for said, variants in parts.items())


def octave(upto: int) -> str:
    """The numbers above upto / 2 and at most upto, as a label."""
    first = upto // 2 + 1
    return f"{upto}" if first >= upto else f"{first}–{upto}"


def latency(rows: pd.DataFrame, titles: Mapping[str, str]) -> plt.Figure:
    """Milliseconds against T, a panel for each mode, a line for each layer; dotted lines are its floor."""
    figure, panels = plt.subplots(1, len(titles), figsize=(4.6 * len(titles), 4), squeeze=False)
    for ax, (mode, title) in zip(panels[0], titles.items(), strict=True):
        told = rows[rows["mode"] == mode].to_dict("records")
        ylabel = "milliseconds (dotted: floor)"
        plot_lines(ax, told, "milliseconds", title=title, ylabel=ylabel, floor="floor_milliseconds")
    return figure


def legend_beside(ax: Axes, *others: Axes) -> None:
    """The legend to the right of the axes, of all that is labelled there or in other panels."""
    found: dict[str, Any] = {}
    for panel in (ax, *others):
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    ax.legend(found.values(), found, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def in_words(means: pd.DataFrame, names: str, *, digits: int = 2) -> str:
    """Rows of `over_seeds` from small to large: 'rat 60.12 ± 0.31, attention 61.00 ± 0.20'; ± is left out for one."""
    parts = []
    for row in means.sort_values("mean").itertuples():
        spread = f" ± {row.std:,.{digits}f}" if row.count > 1 else ""
        parts.append(f"{getattr(row, names)} {row.mean:,.{digits}f}{spread}")
    return ", ".join(parts)


def from_size_to_size(runs: pd.DataFrame, value: str) -> str:
    """Whether a column of pure RAT runs grows with L, seed by seed: 'from 1 to 4 it falls, from 4 to 16 it grows with 1
    of 2 seeds'; a size is compared with the next one by the seeds that both have."""
    sizes = runs[runs.pattern == "rat"].pivot(index="seed", columns="chunk_size", values=value).sort_index(axis=1)
    parts = []
    for smaller, larger in pairwise(sizes):
        change = (sizes[larger] - sizes[smaller]).dropna()
        grown = int((change > 0).sum())
        said = {0: "falls", len(change): "grows"}.get(grown, f"grows with {grown} of {len(change)} seeds")
        parts.append(f"from {smaller} to {larger} it {said}")
    return ", ".join(parts)


def number_of_seeds(table: pd.DataFrame) -> str:
    """How many seeds the variants have: '3 seeds', '1 seed', '2 to 3 seeds'."""
    counts = table.groupby("variant").seed.nunique()
    least, most = int(counts.min()), int(counts.max())
    return f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most > 1)}"


class Inside(NamedTuple):
    """A layer in a pass over T tokens.

    Attributes:
        memory: (T, D), how many tokens back each channel's gate remembers, 1 / (1 - g).
        weights: (H, T, E + 1), see `rat.ops.chunk_attention_weights`; None for other gated layers than RAT.
    """

    memory: np.ndarray
    weights: np.ndarray | None


@torch.inference_mode()
def look_inside(model: CausalLM, tokens: Sequence[int]) -> dict[int, Inside]:
    """The gated layers of a model, by number, while it reads a text."""
    gated = {i: layer.mixer for i, layer in enumerate(model.layers) if isinstance(layer.mixer, GatedMixer)}
    weights: dict[int, np.ndarray] = {}

    def keep(i: int, mixer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        weights[i] = mixer.attention_weights(given[0])[0].numpy()

    hooks = [mixer.register_forward_pre_hook(partial(keep, i)) for i, mixer in gated.items() if isinstance(mixer, RAT)]
    for mixer in gated.values():
        mixer.watched = True
    model(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return {i: Inside(mixer.memory_length()[0].numpy(), weights.get(i)) for i, mixer in gated.items()}


def lengths_of_memory(ax: Axes, layers: Mapping[int, Inside], chunk_size: int) -> None:
    """How far back the gates of each layer remember: channels in order of their median over tokens."""
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(layers)))
    for (layer, inside), shade in zip(layers.items(), shades, strict=True):
        medians = np.sort(np.median(inside.memory, axis=0))
        ax.plot(np.linspace(0, 100, len(medians)), medians, color=shade, label=f"layer {layer}")
    ax.axhline(chunk_size, color="black", linestyle=":", linewidth=1, label=f"chunk, L = {chunk_size}")
    ax.set(yscale="log", xlabel="channels in order, %", ylabel="memory 1 / (1 - g), tokens")
    legend_beside(ax)


def token_grid(ax: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], *, log: bool = False) -> Any:
    """A heat map (rows, columns) with texts at both sides; the image, for a colour bar."""
    norm = LogNorm(vmin=1, vmax=max(2.0, float(values.max()))) if log else None
    image = ax.imshow(values, aspect="auto", cmap="viridis" if log else "Blues", norm=norm, interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.grid(visible=False)
    return image


def share_of_letters(text: str) -> float:
    """Of its characters, how many are letters or spaces, from 0 to 1."""
    return sum(character.isalpha() or character == " " for character in text) / max(1, len(text))


def visible(texts: Sequence[str]) -> Iterator[str]:
    """Pieces of text as labels: line breaks and tabs are seen, a dollar sign starts no formula."""
    for text in texts:
        yield text.replace("\n", "↵").replace("\t", "→").strip(" ").replace("$", r"\$") or "␣"
