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
from statistics import fmean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import t

from rat.markdown import header, line, write_block
from rat_cli import figures
from rat_cli.sweep_results import PAGE, mean_and_spread, read_curves, read_positions, read_runs, write_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "docs" / "results", (ROOT / "docs" / "results.md", ROOT / "README.md")
WITHIN_1_PERCENT = 0.01  # of the perplexity, as a difference of losses
NOTHING_YET = ["No runs yet."]
ENOUGH = 3  # seeds for a verdict
CONFIDENCE = 0.95  # of a verdict, each for itself
GUESSED = 8 / 36  # of all answers of recall: one is right of a sample of 1 to 8 pairs
NOTHING = 0.02  # of accuracy, above what guessing gets or below all
MODES = {"train": "train step, D 512", "prefill": "prefill, D 512", "decode": "decoding at position T, 16 rows, D 512"}
REMEMBERED = {"recall": "val/accuracy", "needles": "val/sequence_accuracy"}  # by sweep, what counts as right
MEMORY = [("recall", "items"), ("recall", "distance"), ("needles", "distance")]


class Claim(NamedTuple):
    """That a variant measures less than another.

    Attributes:
        says: in words.
        paper: its numbers.
        measure: what is measured, one of MEASURES.
        less: the variant that measures less.
        more: the variant that measures more.
        allowance: how much more the first may measure all the same.
    """

    says: str
    paper: str
    measure: str
    less: str
    more: str
    allowance: float = 0.0


CLAIMS = [
    Claim("RAT is at most 1 % worse than attention", "7.67, 7.61", "loss", "rat-L16", "attention", WITHIN_1_PERCENT),
    Claim("RAT is better than the RNN", "7.67, 7.82*", "loss", "rat-L16", "rnn"),
    Claim("attention is better than the RNN", "7.61, 7.82*", "loss", "attention", "rnn"),
    Claim("RAT + SWA is better than RAT", "7.57, 7.67", "loss", "rat-swa", "rat-L16"),
    Claim("RAT + SWA is better than attention", "7.57, 7.61", "loss", "rat-swa", "attention"),
    Claim("RAT + SWA is better than attention + SWA", "7.57, 7.61", "loss", "rat-swa", "attention-swa"),
    Claim("L 16 is better than L 64", "in words*", "loss", "rat-L16", "rat-L64"),
    Claim("none; one chunk of T computes what the RNN does", "", "loss", "rat-L512", "rnn"),
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
    return sorted(path.parent.name for path in RESULTS.glob(f"*/{PAGE}"))


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
        said = verdict([*difference], claim.allowance)
        if measure.guessed is not None and pair.mean().max() < measure.guessed + NOTHING:
            said = "both guess"
        elif measure.guessed is not None and pair.mean().min() > 1 - NOTHING:
            said = "both solve it"
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
    table = figures.accuracies(read_curves(RESULTS / sweep), number)
    octaves = sorted(table.upto.unique())
    yield from header("variant", "seeds", *(figures.octave(upto) for upto in octaves))
    for variant, rows in table.groupby("variant", sort=False):
        yield line(
            variant, rows.seed.nunique(), *(mean_and_spread(rows[rows.upto == upto].accuracy) for upto in octaves)
        )
    chance = _chance(sweep, number, table)
    if isinstance(chance, dict):
        yield line("guessing", "", *(f"{chance[upto]:.3f}" for upto in octaves))


def trade_off_lines() -> Iterator[str]:
    """What each backbone keeps of a text and what it reaches, a line for each, from the largest cache to the least.

    Where a task's text is no longer than a chunk, a variant computes there what the RNN does, and has no answer of its
    own.
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
            own = found[(found.variant == variant) & (found.chunk_size < found.max_seq_len)]
            cells.append(mean_and_spread(own[REMEMBERED[name]]))
        yield line(variant, cache, perplexity, len(rows), *cells)


def speed_lines() -> Iterator[str]:
    """How many times as fast as attention a layer of RAT is, by T, as notebooks/efficiency.ipynb has measured it."""
    paths = sorted((RESULTS / "efficiency").glob("*/layer.json"), reverse=True)  # fp32 first
    reports = [json.loads(path.read_text()) for path in paths]
    lengths = sorted({row["seq_len"] for report in reports for row in report["rows"]})
    yield from header("RAT with L 16 against attention", "dtype", *(f"T {length:,}" for length in lengths))
    for mode, says in MODES.items():
        for report in reports:
            of_rat = [row for row in report["rows"] if row["mode"] == mode and row["contender"] == "rat"]
            found = {row["seq_len"]: f"{row['speedup']:.1f}x" for row in of_rat}
            if found:
                dtype = report["options"]["dtype"]
                yield line(says, {"float32": "fp32", "bfloat16": "bf16"}[dtype], *(found[T] for T in lengths))
    yield ""
    rates = {report["options"]["dtype"]: report["rates"]["flops_per_second"] / 1e9 for report in reports}
    yield (
        f"On {reports[0]['machine']['threads']} cores of an {reports[0]['machine']['processor']}, matrix products at "
        f"{rates['float32']:.0f} GFLOP/s in fp32 and {rates['bfloat16']:.0f} in bf16."
    )


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
    """A hash of all tables, which the pictures carry: whether they are of these records."""
    return hashlib.sha256(json.dumps(tables()).encode()).hexdigest()


def draw() -> None:
    """The pictures, beside the records."""
    source = {"Source": drawn_from()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    if "chunk_size" in sweeps():
        figures.against_chunk_size(left, read_runs(RESULTS / "chunk_size"), "val/perplexity", "validation perplexity")
        figures.by_position(right, positions(), [trained_length()], since=16)
        figures.legend_beside(right)
    figure.savefig(RESULTS / "language.png", metadata=source)
    figure, panels = plt.subplots(1, 3, figsize=(18, 4.2), sharey=True)
    for ax, number in zip(panels, ("items", "distance"), strict=False):
        if "recall" in sweeps():
            table = figures.accuracies(read_curves(RESULTS / "recall"), number)
            figures.by_octave(ax, table, f"recall: {number}", _chance("recall", number, table))
    if "needles" in sweeps():  # at the end nearly all find it, at any distance
        figures.while_training(
            panels[-1], read_curves(RESULTS / "needles"), REMEMBERED["needles"], "needles, while training"
        )
    figures.legend_beside(panels[-1], *panels[:-1])
    figure.savefig(RESULTS / "memory.png", metadata=source)


def _chance(sweep: str, number: str, table: pd.DataFrame) -> float | dict[int, float]:
    """What guessing gets; of recall by octave."""
    if sweep == "recall":
        found = figures.guessing(RESULTS / sweep, number)
        return {upto: found[upto] for upto in table.upto.unique()}
    return figures.GUESSED_DIGIT


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
