"""What the runs of a sweep have found: a record of each, small enough to be kept, and tables of all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from filelock import FileLock

from lightning_modules.atomic import replacing
from lightning_modules.dashboard import unread
from lightning_modules.event_files import read_scalars
from lightning_modules.run_record import SUMMARY, read_summary
from rat import CausalLM, ModelConfig
from rat.markdown import header, line

RUN, CONFIG, SCALARS, LENGTHS = "run.json", "config.yaml", "scalars.csv", "lengths.json"
TABLE, PAGE = "table.csv", "table.md"
LOCK = ".lock"
PARTED = 0.2  # a standard deviation of accuracies: above it, their mean is that of no run
_ARCHITECTURE = ("chunk_size", "rope_base", "max_seq_len")


class Run(NamedTuple):
    """One run of a sweep: its number in the grid, what is varied, and the seed."""

    index: int
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """What its folders are called."""
        return f"{self.variant}-s{self.seed}"


def keep_record(run: Run, folder: Path, output: Path) -> None:
    """Keep what a finished run in `folder` has found, as `output/<run>`, whole or not at all.

    The record holds run.json (number, variant, seed), config.yaml (with which `cli.py fit` makes this run again),
    summary.json, scalars.csv (step, tag and value of everything logged) and, where it was evaluated, lengths.json.
    """
    with replacing(output / run.name) as partial:
        partial.mkdir()
        for name in (CONFIG, SUMMARY, LENGTHS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        scalars = read_scalars(folder)[["step", "tag", "value"]]
        scalars.to_csv(partial / SCALARS, index=False, float_format="%.6g")
        (partial / RUN).write_text(json.dumps(run._asdict()) + "\n")


def records(output: Path) -> Iterator[tuple[Run, Path]]:
    """The runs whose records are in `output`, in the order of the grid, and where."""
    # a name that begins with a dot is a record half-written
    paths = [path for path in output.glob(f"*/{RUN}") if not path.parent.name.startswith(".")]
    found = [(Run(**json.loads(path.read_text())), path.parent) for path in paths]
    yield from sorted(found)


def read_runs(output: Path) -> pd.DataFrame:
    """One row for each finished run of a sweep.

    Columns: run, variant, seed; pattern, chunk_size, rope_base (both missing where no layer reads them) and max_seq_len
    of the model; parameters, non_embedding_parameters; cache_bytes (of one sequence as long as in training, in bf16,
    but states of recurrences in fp32); steps, tokens; the last value of every val/...; the tokens_per_second of its
    last start; commits of the code of all starts.

    Raises:
        FileNotFoundError: there is none.
    """
    return pd.DataFrame([_row(run, record) for run, record in _some(output)]).astype({"chunk_size": "Int64"})


def read_curves(output: Path) -> pd.DataFrame:
    """Everything that the finished runs have logged: columns run, variant, seed, step, tag, value.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    return _together(output, [(run, pd.read_csv(record / SCALARS)) for run, record in records(output)])


def read_positions(output: Path) -> pd.DataFrame:
    """The loss by position of the finished runs, in spans: run, variant, seed, first, last, loss, within.

    `within` is half of a 95 % interval over the texts; positions count from 1.

    Raises:
        FileNotFoundError: there is no finished run that was evaluated so.
    """
    evaluated = [(run, record / LENGTHS) for run, record in records(output) if (record / LENGTHS).is_file()]
    return _together(output, [(run, pd.DataFrame(_evaluated(path)["positions"])) for run, path in evaluated])


def read_lengths(record: Path) -> list[int]:
    """The lengths that a record's model was evaluated at."""
    return sorted(int(length) for length in _evaluated(record / LENGTHS)["lengths"])


def write_tables(output: Path) -> str:
    """Write table.csv, a row for each run, and table.md, a row for each variant; the latter's text.

    Processes that do so at the same time, such as tasks of an array, wait for each other.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    _some(output)
    with FileLock(output / LOCK):
        runs = read_runs(output)
        with replacing(output / TABLE) as partial:
            runs.to_csv(partial, index=False, float_format="%.6g")
        with replacing(output / PAGE) as partial:
            partial.write_text(page := _page(runs))
    return page


def _some(output: Path) -> list[tuple[Run, Path]]:
    """Its records, of which there must be one."""
    found = [*records(output)]
    if not found:
        raise FileNotFoundError(f"{output} holds no record of a run: python cli.py sweep makes them")
    return found


def _row(run: Run, record: Path) -> dict[str, Any]:
    summary = read_summary(record)
    config = ModelConfig(**yaml.safe_load((record / CONFIG).read_text())["model"]["model"])
    with torch.device("meta"):
        model = CausalLM(config)
    scalars = pd.read_csv(record / SCALARS)
    architecture = {name: getattr(config, name) for name in _ARCHITECTURE} | dict.fromkeys(unread(config))
    commits = [start["code"]["commit"] or "unknown" for start in summary["starts"]]
    last = scalars[scalars.tag.str.startswith("val/")].groupby("tag").value.last()
    return {
        "run": run.name, "variant": run.variant, "seed": run.seed, "pattern": " ".join(config.pattern),
        **{name: architecture[name] for name in _ARCHITECTURE},
        "parameters": model.num_parameters(),
        "non_embedding_parameters": model.num_parameters() - config.vocab_size * config.d_model,
        "cache_bytes": model.cache_bytes(config.max_seq_len),
        "steps": summary["steps"], "tokens": summary["tokens"], **last,
        "tokens_per_second": summary["tokens_per_second"], "commits": " ".join(dict.fromkeys(commits)),
    }  # fmt: skip


def _evaluated(path: Path) -> dict[str, Any]:
    (model,) = json.loads(path.read_text())["models"].values()
    return model


def _together(output: Path, found: list[tuple[Run, pd.DataFrame]]) -> pd.DataFrame:
    if not found:
        raise FileNotFoundError(f"{output} holds no such record of a run: python cli.py sweep makes them")
    return pd.concat(
        [rows.assign(run=run.name, variant=run.variant, seed=run.seed) for run, rows in found], ignore_index=True
    )


def _page(runs: pd.DataFrame) -> str:
    """Markdown: means over seeds, with their standard deviations."""
    # of accuracies that are told apart, table.csv has every one
    measured = [name for name in runs.columns if name.startswith("val/") and name.count("/") == 1]
    lines = [*header("variant", "parameters", "cache bytes", "tokens of training", "seeds", *measured)]
    for variant, seeds in runs.groupby("variant", sort=False):
        first = seeds.iloc[0]
        counts = [f"{count:,}" for count in (first.parameters, first.cache_bytes, first.tokens, len(seeds))]
        lines.append(line(variant, *counts, *(_cell(seeds[name].dropna(), name) for name in measured)))
    return "\n".join(lines) + "\n"


def _cell(values: "pd.Series[float]", name: str) -> str:
    if name.endswith("accuracy"):
        return accuracy_of_seeds(values)
    return mean_and_spread(values, 2 if name.endswith("perplexity") else 3)


def accuracy_of_seeds(values: "pd.Series[float]") -> str:
    """`mean_and_spread`, but where some seeds have learned what others have not, all: '0.216, 0.998, 1.000'."""
    if len(values) > 1 and values.std() > PARTED:
        return ", ".join(f"{value:.3f}" for value in sorted(values))
    return mean_and_spread(values)


def mean_and_spread(values: "pd.Series[float]", digits: int = 3) -> str:
    """Mean and standard deviation for a table: '3.950 ± 0.028', '3.950' of one value, nothing of none."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}" if len(values) else ""
