"""How much a notebook does, and the commands that it calls for that. Nothing is trained here but by `cli.py`."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from rat.benchmarks.provenance import machine_facts
from rat.benchmarks.timing import Rates

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("small", "full")
REPORT = "layer.json"  # of cli.py bench layer

# of packages that would show a bar in the page, which commands do in their own output
warnings.filterwarnings("ignore", message="IProgress not found")


@dataclass(frozen=True)
class Setting:
    """How much a notebook does: `full` reads and writes docs/results and runs/; `small` takes seconds, all of it in a
    temporary folder, which commands are shown with as $RESULTS.

    Attributes:
        name: small or full.
    """

    name: str

    def __str__(self) -> str:
        return f"setting: {self.name}" + "; this shows that the page works, and no results" * self.small

    @property
    def small(self) -> bool:
        """Whether it takes seconds."""
        return self.name == "small"

    @cached_property
    def results(self) -> Path:
        """Where the records and measurements are."""
        return Path(self._temporary.name) if self.small else ROOT / "docs" / "results"

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="notebook-")

    def cli(self, *arguments: object, quiet: bool = False) -> None:
        """Show a command of cli.py, call it in the repository's folder, and print what it says as it says it.

        Args:
            arguments: of the command.
            quiet: show the command alone.

        Raises:
            RuntimeError: it has failed; with the end of what it wrote to stderr.
        """
        words = [str(argument) for argument in arguments]
        print(self._shown("$ python cli.py " + shlex.join(words)), flush=True)
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "cli.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            try:
                for line in process.stdout or ():
                    if not quiet:
                        print(self._shown(line), end="", flush=True)
            except BaseException:  # the cell was interrupted
                process.terminate()
                raise
            finally:
                process.wait()
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"the command ended with {process.returncode}:\n{errors.read()[-2000:]}")

    def sweep(self, name: str, variants: Sequence[str], options: Mapping[str, Any], *further: object) -> Path:
        """Collect the finished runs of configs/ablation/NAME.yaml, which are trained by the same command without
        --table_only. The small setting trains some of its variants right here.

        Args:
            name: of the sweep.
            variants: those of the small setting.
            options: of fit, which make its runs small.
            further: arguments of its command.

        Returns:
            The folder of the records, for `rat_cli.sweep_results`.
        """
        file = Path("configs", "ablation", f"{name}.yaml")
        if not self.small:
            self.cli("sweep", "--config", file, "--table_only", "true")
            return self.results / name
        content = yaml.safe_load((ROOT / file).read_text())
        chosen = {variant: content["variants"][variant] for variant in variants}
        given = {"variants": chosen, "seeds": [0], "options": content.get("options", {}) | dict(options)}
        folders = ["--runs", self.results / "runs", "--output", self.results / name]
        self.cli("sweep", "--config", file, *_words(given), *folders, *further)
        return self.results / name

    def bench(self, name: str, **options: Any) -> pd.DataFrame:
        """Measure layers by `cli.py bench layer`, unless it was done before on such a machine with these options. What
        docs/results holds of another machine stays, and this one's goes to runs/notebooks. To measure again, remove the
        folder.

        Args:
            name: of the folder.
            options: of the command.

        Returns:
            The rows of layer.json, and with each the call (NAME), chunk_size, dtype and batch_size that it comes from.
        """
        folder = self.results / name
        if (folder / REPORT).is_file() and not _is_of_here(folder):
            folder = ROOT / "runs" / "notebooks" / name
        if not _is_whole(folder, options):
            shown = folder if self.small else folder.relative_to(ROOT)
            self.cli("bench", "layer", *_words(options), "--output", shown, quiet=True)
        content = json.loads((folder / REPORT).read_text())
        print(f"{name}: {content['machine']['processor']}, {Rates(**content['rates'])}", flush=True)
        columns = {key: content["options"][key] for key in ("chunk_size", "dtype", "batch_size")}
        return pd.DataFrame(content["rows"]).assign(call=name, **columns)

    def language_sweep(self, name: str, variants: Sequence[str]) -> Path:
        """`sweep` of language models. Those of the small setting are tiny and read the pages in docs/."""
        tiny: dict[str, Any] = {}
        if self.small:
            tiny = {
                "trainer.max_steps": 2, "model.val_every_n_steps": 2, "model.model.d_model": 32,
                "model.model.num_heads": 2, "model.model.num_layers": 2, "model.model.max_seq_len": 32,
                "model.model.window_size": 8, "data.init_args.seq_len": 32, "data.init_args.path": str(self.corpus),
            }  # fmt: skip
        return self.sweep(name, variants, tiny, "--lengths", "[16, 32, 64]")

    @cached_property
    def corpus(self) -> Path:
        """The tokenized pages of docs/, which tiny language models read; made when first asked for."""
        texts, data = self.results / "texts", self.results / "data"
        texts.mkdir()
        for page in (ROOT / "docs").glob("*.md"):
            (texts / page.with_suffix(".txt").name).write_text(page.read_text())
        self.cli("prepare", "pretrain", "--source", texts, "--output", data, "--vocab_size", 512, "--held_out", 0.3)
        return data

    def _shown(self, text: str) -> str:
        return text.replace(str(self.results), "$RESULTS") if self.small else text


def chosen_setting() -> Setting:
    """The setting that the environment variable RAT_NOTEBOOKS names, full where there is none. Pictures look alike from
    here on.

    Raises:
        ValueError: it names another.
    """
    name = os.environ.get("RAT_NOTEBOOKS", "full")
    if name not in SETTINGS:
        raise ValueError(f"RAT_NOTEBOOKS is {name!r}: take one of {', '.join(SETTINGS)}")
    from rat_cli import figures  # behind the filter above

    figures.use_style()
    return Setting(name)


def _is_of_here(folder: Path) -> bool:
    """Whether the benchmark in a folder is of such a processor, as many threads and the torch of here."""
    of_here, of_it = machine_facts(torch.device("cpu")), json.loads((folder / REPORT).read_text())["machine"]
    return all(of_it[fact] == of_here[fact] for fact in ("processor", "threads", "torch"))


def _is_whole(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether the folder holds a benchmark of here that came to its end and was called with these options."""
    if not ((folder / REPORT).is_file() and _is_of_here(folder)):
        return False
    report = json.loads((folder / REPORT).read_text())
    return report["complete"] and all(report["options"][key] == value for key, value in options.items())


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options of a command as its arguments."""
    given = {f"--{key}": value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [word for pair in given.items() for word in pair]
