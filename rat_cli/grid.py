"""What a sweep consists of: its runs, the options of each, and whether a folder holds one of them."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from datamodules.dataset import TokenDataset
from datamodules.shards import TokenShards
from lightning_modules.run_record import read_summary
from rat_cli.info import InfoCLI
from rat_cli.plan import NotCountedError, read_plan
from rat_cli.sweep_results import CONFIG, LENGTHS, RUN, Run, read_lengths

# What a run's result follows from, beside its model and data.
_TRAINER = (
    "max_steps", "max_epochs", "precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches",
    "limit_train_batches", "limit_val_batches",
)  # fmt: skip
# What of the data it does not follow from.
_READING = ("data.init_args.num_workers", "data.init_args.verify_checksums")


@dataclass
class Grid:
    """What `sweep` was told, checked."""

    name: str
    fit: list[Path]
    variants: dict[str, dict[str, Any]]
    seeds: list[int]
    options: dict[str, Any]
    lengths: list[int] | None
    runs: Path
    output: Path
    devices: int | None
    num_nodes: int | None
    configs: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[Run]:
        """All seeds of the grid's variants: the first seed of each comes first."""
        grid = [(variant, seed) for seed in self.seeds for variant in self.variants]
        yield from (Run(index, variant, seed) for index, (variant, seed) in enumerate(grid))

    def folder(self, run: Run) -> Path:
        """Where a run trains."""
        return self.runs / self.name / run.name

    def is_finished(self, run: Run) -> bool:
        """Whether its record is kept."""
        return (self.output / run.name / RUN).is_file()

    def arguments(self, run: Run) -> list[str]:
        """Those of `cli.py fit`."""
        given = {
            **self.options,
            **self.variants[run.variant],
            "seed_everything": run.seed,
            "data.init_args.seed": run.seed,
            "trainer.logger.init_args.save_dir": str(self.runs),
            "trainer.logger.init_args.name": self.name,
            "trainer.logger.init_args.version": run.name,
        }
        given |= {
            f"trainer.{name}": count
            for name, count in (("devices", self.devices), ("num_nodes", self.num_nodes))
            if count is not None
        }
        words = [word for path in self.fit for word in ("--config", str(path))]
        return words + [f"--{key}={_as_word(value)}" for key, value in given.items()]

    def config(self, run: Run) -> dict[str, Any]:
        """The whole configuration of a run, as its config.yaml will hold it."""
        if run.variant not in self.configs:
            try:
                cli = InfoCLI(self.arguments(run), prog="cli.py fit")
            except SystemExit:  # what is wrong has been said
                print(f"this is of the variant {run.variant}", file=sys.stderr)
                raise
            with suppress(NotCountedError):
                read_plan(cli.config)
            self.configs[run.variant] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, skip_check=True))
        config = self.configs[run.variant]
        data = config["data"] | {"init_args": config["data"]["init_args"] | {"seed": run.seed}}
        return config | {"seed_everything": run.seed, "data": data}

    def check(self) -> None:
        """Ask of every run whether fit would take it, and whether what is in its folders is of this run.

        Raises:
            ValueError: it would not, or a folder holds a run of other options; the message says which.
        """
        for run in self:
            config = self.config(run)
            exporting = any(
                given["class_path"].endswith(".ExportModel") for given in config["trainer"]["callbacks"] or []
            )
            if self.lengths and not exporting:
                raise ValueError(f"{run.name}: lengths are of exported models: add lightning_modules.ExportModel")
            for folder in (self.output / run.name, self.folder(run)):
                if (folder / CONFIG).is_file() and (other := _difference(config, folder / CONFIG)):
                    raise ValueError(
                        f"{folder} holds a run with {other}: move it away, or change the sweep's name and output"
                    )
            if self.lengths and self.is_finished(run):
                record = self.output / run.name
                if not (record / LENGTHS).is_file():
                    raise ValueError(f"{record} was kept without lengths: move it away")
                # the text is cut at the longest, so that others would be of other windows
                if (other := read_lengths(record)) != sorted(self.lengths):
                    raise ValueError(f"{record} was evaluated at the lengths {other}: ask for these, or move it away")
        self._texts()

    def check_data(self, wanted: list[Run]) -> None:
        """Ask whether what these runs read is there, what the others have read, and long enough for the lengths.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is another text than that of the records, or too short, or made as training goes, where
                lengths are asked for.
        """
        runs_of = {self.config(run)["data"]["init_args"].get("path"): run.name for run in reversed(wanted)}
        for path, name in runs_of.items():
            if path is None:
                if self.lengths:
                    raise ValueError(f"{name}: lengths are of prepared text, and its data has no path: leave them out")
            elif not Path(path).is_dir():
                raise FileNotFoundError(
                    f"{name} would read {path}, which is not there: python cli.py prepare makes it, see docs/data.md"
                )
            elif self.lengths:
                TokenDataset(TokenShards(Path(path, "val")), max(self.lengths), eos_id=0)
        for (path, split), (checksum, name) in self._texts().items():
            if path in runs_of and TokenShards(Path(path, split)).checksum != checksum:
                raise ValueError(
                    f"{Path(path, split)} is not the text that {name} in {self.output} has read: their losses could not"
                    " be compared; prepare it as before, or give another output"
                )

    def _texts(self) -> dict[tuple[str, str], tuple[str, str]]:
        """What the records have read: the checksum, and a run that read it, by folder of data and split.

        Raises:
            ValueError: two records of one folder of data are of different texts.
        """
        seen: dict[tuple[str, str], tuple[str, str]] = {}
        for run in filter(self.is_finished, self):
            path = self.config(run)["data"]["init_args"].get("path")
            for start in read_summary(self.output / run.name).get("starts", []):
                for split, checksum in (start.get("data") or {}).items():
                    before, other = seen.setdefault((path, split), (checksum, run.name))
                    if checksum != before:
                        raise ValueError(
                            f"{run.name} and {other} in {self.output} read different texts from {path}/{split}: their"
                            " losses cannot be compared; move the records of one text away"
                        )
        return seen


def _difference(config: dict[str, Any], path: Path) -> str | None:
    """Where the configuration that was written to `path` differs in what decides a run's result; None: nowhere."""
    before = yaml.safe_load(path.read_text())
    if not isinstance(before, dict):
        raise ValueError(f"{path} is no configuration of a run: remove it")
    for section in ("seed_everything", "model", "data", "guard", "trainer"):
        new, old = _flat(config[section], section), _flat(before.get(section), section)
        for key in sorted({*new, *old}):
            decides = key.removeprefix("trainer.") in _TRAINER if section == "trainer" else key not in _READING
            if decides and new.get(key) != old.get(key):
                return f"{key} {old.get(key)} instead of {new.get(key)}"
    return None


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}").items()}


def _as_word(value: Any) -> str:
    """As the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
