"""Write the tables of docs/results.md and of the README from the records in docs/results, and draw the pictures.

python docs/write_results.py
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import t

from rat.markdown import header, line, write_block
from rat_cli import figures
from rat_cli.sweep_results import (
    PAGE,
    RUN,
    accuracy_of_seeds,
    mean_and_spread,
    read_curves,
    read_positions,
    read_runs,
    write_tables,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "docs" / "results", (ROOT / "docs" / "results.md", ROOT / "README.md")
WITHIN_1_PERCENT = 0.01  # of the perplexity, as a difference of losses
NOTHING_YET = ["No runs yet."]
ENOUGH = 3  # seeds for a verdict
CONFIDENCE = 0.95  # of a verdict, each for itself
GUESSED = 8 / 36  # of all answers of recall: one is right of a sample of 1 to 8 pairs
NOTHING = 0.02  # of accuracy, above what guessing gets or below all
MODES = {"train": "train step", "prefill": "prefill", "decode": "decoding at position T"}
REMEMBERED = {"recall": "val/accuracy", "needles": "val/sequence_accuracy"}  # by sweep, what counts as right
MEMORY = [("recall", "items"), ("recall", "distance"), ("needles", "distance")]
NONE_OF_ITS_OWN = "one chunk"  # where a variant computes what the RNN does


class Claim(NamedTuple):
    """That a variant measures less than another.

    Attributes:
        says: in words.
        paper: its numbers.
        measure: what is measured, one of MEASURES.
        less: the variant that measures less.
        more: the variant that measures more.
        allowance: how much more the first may measure all the same.
        control: nothing is claimed; they should measure the same.
    """

    says: str
    paper: str
    measure: str
    less: str
    more: str
    allowance: float = 0.0
    control: bool = False


CLAIMS = [
    Claim("RAT is at most 1 % worse than attention", "7.67, 7.61", "loss", "rat-L16", "attention", WITHIN_1_PERCENT),
    Claim("RAT is better than the RNN", "7.67, 7.82*", "loss", "rat-L16", "rnn"),
    Claim("attention is better than the RNN", "7.61, 7.82*", "loss", "attention", "rnn"),
    Claim("RAT + SWA is better than RAT", "7.57, 7.67", "loss", "rat-swa", "rat-L16"),
    Claim("RAT + SWA is better than attention", "7.57, 7.61", "loss", "rat-swa", "attention"),
    Claim("RAT + SWA is better than attention + SWA", "7.57, 7.61", "loss", "rat-swa", "attention-swa"),
    Claim("L 16 is better than L 64", "in words*", "loss", "rat-L16", "rat-L64"),
    Claim("none; one chunk of T computes what the RNN does", "", "loss", "rat-L512", "rnn", control=True),
    Claim("RAT + SWA is better off without RoPE", "2.66, 3.59", "beyond", "rat-swa-nope", "rat-swa"),
    Claim(
        "attention + SWA is better off without RoPE", "3.03, above 3.8", "beyond", "attention-swa-nope", "attention-swa"
    ),
    Claim(
        "without RoPE, RAT + SWA beats attention + SWA", "2.66, 3.03", "beyond", "rat-swa-nope", "attention-swa-nope"
    ),
    Claim("with RoPE, RAT + SWA beats attention + SWA", "3.59, above 3.8", "beyond", "rat-swa", "attention-swa"),
    Claim("without RoPE, RAT + SWA beats the RNN", "2.66, 2.67*", "beyond", "rat-swa-nope", "rnn"),
    Claim("RAT recalls more than the RNN", "in words", "recall", "rnn", "rat-L16"),
    Claim("attention recalls more than RAT", "in words", "recall", "rat-L16", "attention"),
    Claim("RAT finds more needles than the RNN", "in words", "needles", "rnn", "rat-L16"),
    Claim("attention finds more needles than RAT", "in words", "needles", "rat-L16", "attention"),
    Claim("L 16 finds more needles than L 64", "in words", "needles", "rat-L64", "rat-L16"),
]


def sweeps() -> list[str]:
    """Those that have finished runs."""
    return sorted({path.parents[1].name for path in RESULTS.glob(f"*/*/{RUN}")})


def positions() -> pd.DataFrame:
    """The loss by position of the runs of chunk_size and positions."""
    found = [read_positions(RESULTS / sweep) for sweep in ("chunk_size", "positions") if sweep in sweeps()]
    return pd.concat([pd.DataFrame(columns=["variant", "seed", "first", "last", "loss"]), *found], ignore_index=True)


@cache
def trained_length() -> int:
    """T of the language models."""
    return figures.trained_length(RESULTS / "chunk_size")


def beyond() -> pd.DataFrame:
    """Loss of every run over the positions from T + 1 to 4 T: variant, seed, value."""
    found = [
        (variant, seed, figures.loss_between(rows, trained_length(), 4 * trained_length()).iloc[0])
        for (variant, seed), rows in positions().groupby(["variant", "seed"], sort=False)
    ]
    return pd.DataFrame(found, columns=["variant", "seed", "value"])


def of_runs(sweep: str, column: str) -> pd.DataFrame:
    """A column of a sweep's runs: variant, seed, value."""
    if sweep not in sweeps():
        return pd.DataFrame(columns=["variant", "seed", "value"])
    return read_runs(RESULTS / sweep)[["variant", "seed", column]].rename(columns={column: "value"})


class Measure(NamedTuple):
    """What is compared: in words, the values of all runs (variant, seed, value), and what guessing gets, if any."""

    says: str
    read: Callable[[], pd.DataFrame]
    guessed: float | None = None


MEASURES = {
    "loss": Measure("validation loss", lambda: of_runs("chunk_size", "val/loss")),
    "beyond": Measure("loss from T to 4 T", beyond),
    "recall": Measure("right answers, recall", lambda: of_runs("recall", REMEMBERED["recall"]), GUESSED),
    "needles": Measure("right numbers, needles", lambda: of_runs("needles", REMEMBERED["needles"]), 0.0),
}


def verdict(differences: Sequence[float], allowance: float = 0.0) -> str:
    """What differences of one variant to another, one for each seed, say of a claim that they are below `allowance`.

    It is told by Student's t interval around their mean: holds where all of it is below, does not hold where none is.
    """
    count = len(differences)
    if count < ENOUGH:
        return f"too few seeds: {count}"
    within = t.ppf((1 + CONFIDENCE) / 2, count - 1) * stdev(differences) / count**0.5
    above = fmean(differences) - allowance
    return "holds" if above < -within else "does not hold" if above > within else "not told apart"


def judged(claim: Claim, measured: pd.DataFrame, guessed: float | None) -> str:
    """The verdict on a claim.

    Args:
        claim: which.
        measured: a row for each seed, a column for each of the two variants.
        guessed: what guessing gets, of an accuracy.
    """
    said = verdict([*(measured[claim.less] - measured[claim.more])], claim.allowance)
    if len(measured) < ENOUGH:
        return said
    if claim.control:
        return "not told apart" if said == "not told apart" else "they differ"
    if guessed is not None and measured.mean().max() < guessed + NOTHING:
        return "both guess"
    if guessed is not None and measured.mean().min() > 1 - NOTHING:
        return "both solve it"
    return said


def claim_lines() -> Iterator[str]:
    """A line for each claim of which there are runs."""
    yield from header("claim", "the paper", "measured", "here", "difference", "seeds", "verdict")
    tables = {
        name: measure.read().pivot(index="seed", columns="variant", values="value")
        for name, measure in MEASURES.items()
    }
    for claim in CLAIMS:
        measure = MEASURES[claim.measure]
        pair = tables[claim.measure].reindex(columns=[claim.less, claim.more]).dropna()
        if pair.empty:
            continue
        difference = pair[claim.less] - pair[claim.more]
        here = ", ".join(f"{variant} {pair[variant].mean():.3f}" for variant in pair)
        differs = ("+" if difference.mean() >= 0 else "") + mean_and_spread(difference)
        said = judged(claim, pair, measure.guessed)
        yield line(claim.says, claim.paper, measure.says, here, differs, len(pair), said)


def beyond_lines() -> Iterator[str]:
    """The loss by spans of positions, a line for each variant."""
    trained = trained_length()
    spans = [(trained // 2, trained), (trained, 2 * trained), (2 * trained, 4 * trained)]
    yield from header("variant", "seeds", *(f"{after + 1:,} to {upto:,}" for after, upto in spans))
    for variant, rows in positions().groupby("variant", sort=False):
        seeds = [one for _, one in rows.groupby("seed")]
        losses = [pd.Series([figures.loss_between(one, *span).iloc[0] for one in seeds]) for span in spans]
        yield line(variant, len(seeds), *map(mean_and_spread, losses))


def accuracy_lines(sweep: str, number: str) -> Iterator[str]:
    """Accuracies by a number (distance or items), a line for each variant."""
    table, chance = _accuracies(sweep, number)
    octaves = sorted(table.upto.unique())
    yield from header("variant", "seeds", *(figures.octave(upto) for upto in octaves))
    for variant, rows in table.groupby("variant", sort=False):
        cells = [accuracy_of_seeds(rows[rows.upto == upto].accuracy) for upto in octaves]
        yield line(variant, rows.seed.nunique(), *cells)
    if isinstance(chance, dict):
        yield line("guessing", "", *(f"{chance[upto]:.3f}" for upto in octaves))


def trade_off_lines() -> Iterator[str]:
    """What each backbone keeps of a text and what it reaches, a line for each, from the largest cache to the least.

    Where a text is no longer than a chunk, a variant computes what the RNN does, and has no answer of its own.
    """
    runs = read_runs(RESULTS / "chunk_size").sort_values("cache_bytes", ascending=False, kind="stable")
    tasks = {name: read_runs(RESULTS / name) for name in REMEMBERED}
    of_tasks = [f"{name}, T {rows.max_seq_len.iloc[0]}" for name, rows in tasks.items()]
    trained = trained_length()
    yield from header("", f"cache, T {trained}", f"perplexity, T {trained}", "its seeds", *of_tasks)
    for variant, rows in runs.groupby("variant", sort=False):
        cache, perplexity = f"{rows.cache_bytes.iloc[0] / 1000:,.0f} kB", mean_and_spread(rows["val/perplexity"], 1)
        cells = []
        for name, found in tasks.items():
            own = found[(found.variant == variant) & ~(found.chunk_size >= found.max_seq_len).fillna(False)]
            cells.append(accuracy_of_seeds(own[REMEMBERED[name]]) or NONE_OF_ITS_OWN)
        yield line(variant, cache, perplexity, len(rows), *cells)
    yield line("guessing", "", "", "", *(f"{MEASURES[name].guessed:.3f}" for name in tasks))


def speed_lines() -> Iterator[str]:
    """How many times as fast as attention a layer of RAT is, by T, as notebooks/efficiency.ipynb has measured it.

    Raises:
        ValueError: it was measured on several machines.
    """
    paths = sorted((RESULTS / "efficiency").glob("*/layer.json"), reverse=True)  # fp32 first
    reports = [json.loads(path.read_text()) for path in paths]
    machines = {(report["machine"]["processor"], report["machine"]["threads"]) for report in reports}
    if len(machines) != 1:
        raise ValueError(f"{RESULTS / 'efficiency'} holds measurements of {machines}: remove it and measure anew")
    lengths = sorted({row["seq_len"] for report in reports for row in report["rows"]})
    (chunk_size,) = {report["options"]["chunk_size"] for report in reports}
    yield from header(f"RAT with L {chunk_size} against attention", "dtype", *(f"T {length:,}" for length in lengths))
    for mode, says in MODES.items():
        for report in reports:
            times = {
                (row["contender"], row["seq_len"]): row["seconds"] for row in report["rows"] if row["mode"] == mode
            }
            if times:
                options = report["options"]
                what = f"{says}, D {options['d_model']}" + f", {options['batch_size']} rows" * (mode == "decode")
                dtype = {"float32": "fp32", "bfloat16": "bf16"}[options["dtype"]]
                yield line(what, dtype, *(_times_as_fast(times["attention", T], times["rat", T]) for T in lengths))
    yield ""
    ((processor, threads),) = machines
    rates = {
        dtype: [report["rates"]["flops_per_second"] / 1e9 for report in reports if report["options"]["dtype"] == dtype]
        for dtype in ("float32", "bfloat16")
    }
    yield (
        f"On {threads} cores of an {processor}, matrix products at {_range(rates['float32'])} GFLOP/s in fp32 and "
        f"{_range(rates['bfloat16'])} in bf16. Ratios of medians; in parentheses those of the rounds, from the least to"
        " the most."
    )


def _times_as_fast(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Seconds of one and of the other in the same rounds: '2.5x (2.3 to 2.6)'."""
    rounds = [one / other for one, other in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.1f}x ({min(rounds):.1f} to {max(rounds):.1f})"


def _range(values: Sequence[float]) -> str:
    """'240 to 255', or '51'."""
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values))))


@cache
def tables() -> dict[str, list[str]]:
    """All of them, by name."""
    of_language = {"beyond": beyond_lines, "trade-off": trade_off_lines} if "chunk_size" in sweeps() else {}
    return {
        "claims": [*claim_lines()],
        "speed": [*speed_lines()],
        **{name: [*lines()] for name, lines in of_language.items()},
        **{f"{sweep} by {number}": [*accuracy_lines(sweep, number)] for sweep, number in MEMORY if sweep in sweeps()},
        **{sweep: (RESULTS / sweep / PAGE).read_text().splitlines() for sweep in sweeps()},
    }


def places(page: Path) -> list[str]:
    """The names of the tables that a page has a place for."""
    return re.findall(r"<!-- begin (.+) -->", page.read_text())


def drawn_from() -> str:
    """A hash of what the pictures are drawn from, which they carry: whether they are of these records."""
    curves = [(RESULTS / sweep).glob("*/scalars.csv") for sweep in REMEMBERED]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for paths in curves for path in sorted(paths)]
    return hashlib.sha256(json.dumps([tables(), digests]).encode()).hexdigest()


def draw() -> None:
    """The pictures, beside the records."""
    source = {"Source": drawn_from()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    if "chunk_size" in sweeps():
        figures.against_chunk_size(left, read_runs(RESULTS / "chunk_size"), "val/perplexity", "validation perplexity")
        figures.by_position(right, positions(), [trained_length()], since=16)
        figures.legend_beside(right, left)
    figure.savefig(RESULTS / "language.png", metadata=source)
    figure, panels = plt.subplots(1, 3, figsize=(18, 4.2), sharey=True)
    told = {"items": "recall: pairs to remember", "distance": "recall: distance of the answer, tokens"}
    for ax, number in zip(panels, told, strict=False):
        if "recall" in sweeps():
            table, chance = _accuracies("recall", number)
            figures.by_octave(ax, table, told[number], chance)
    if "needles" in sweeps():  # at the end nearly all find it, at any distance
        figures.while_training(
            panels[-1], read_curves(RESULTS / "needles"), REMEMBERED["needles"], "needles, while training"
        )
    figures.legend_beside(panels[-1], *panels[:-1])
    figure.savefig(RESULTS / "memory.png", metadata=source)


def _accuracies(sweep: str, number: str) -> tuple[pd.DataFrame, figures.Chance]:
    """Accuracies by octave of a number, and what guessing gets."""
    if sweep == "recall":
        return figures.recalled(RESULTS / sweep, number)
    return figures.accuracies(read_curves(RESULTS / sweep), number), figures.GUESSED_DIGIT


def main() -> None:
    """Write all of it."""
    matplotlib.use("agg")
    figures.use_style()
    for sweep in sweeps():
        write_tables(RESULTS / sweep)
    made = tables()
    for page in PAGES:
        for name in places(page):
            write_block(page, name, made.get(name, NOTHING_YET))
    draw()


if __name__ == "__main__":
    main()
