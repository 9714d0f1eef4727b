"""A grid of runs, variants times seeds: what is not finished is trained, and all that is becomes one table."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lightning_modules.preemption import SIGNALS
from lightning_modules.run_record import read_summary
from rat_cli.grid import Grid
from rat_cli.lengths import evaluate_lengths
from rat_cli.main import main, rank
from rat_cli.sweep_results import LOCK, PAGE, Run, keep_record, records, write_tables

LOG = "fit.log"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_CLI = Path(__file__).parents[1] / "cli.py"


def sweep(
    name: str,
    fit: list[Path],
    variants: dict[str, dict[str, Any]],
    output: Path,
    seeds: list[int] | None = None,
    lengths: list[int] | None = None,
    options: dict[str, Any] | None = None,
    runs: Path = Path("runs"),
    jobs: int = 1,
    index: int | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    dry_run: bool = False,
    table_only: bool = False,
) -> None:
    """Train every variant with every seed, skip what is finished, and collect one table.

    A run trains in runs/NAME/VARIANT-sSEED by `cli.py fit`, and goes on there if it was interrupted. When it is
    finished, its record is kept in the output: config.yaml, summary.json, scalars.csv, lengths.json. A run whose record
    is there is not trained again, wherever its folder went.

    Args:
        name: of the sweep, and of its folder.
        fit: YAML files that every run of fit is configured by.
        variants: what is compared: a name, and the options of fit that make it.
        output: folder of the records, table.csv (a row for each run) and table.md (a row for each variant).
        seeds: of weights (seed_everything) and of the order of samples (data.init_args.seed). Default: 0.
        lengths: evaluate the loss by position of every finished run at texts of such lengths, in tokens, too.
        options: of fit, for every run.
        runs: folder of all runs.
        jobs: runs at a time, which share the cores and the GPUs; OMP_NUM_THREADS bounds the threads of each.
        index: train this one run of the grid alone, in this process: a task of a SLURM array, with as many ranks as
            there are. --dry_run numbers them.
        devices: of each node, for every run. Default: what the files of fit say.
        num_nodes: for every run. Default: the same.
        dry_run: say what there is to do, and do nothing.
        table_only: collect the table of what is finished, and train nothing.

    Raises:
        FileNotFoundError: there is nothing to make a table of, or to train on.
        ValueError: a variant that fit would not take, arguments out of range, a record or a run that was made with
            other options, runs that failed.
    """
    seeds = [0] if seeds is None else seeds
    grid = Grid(name, fit, variants, seeds, options or {}, lengths, runs, output, devices, num_nodes)
    _check(grid, jobs, index, table_only=table_only)
    if dry_run:
        for run in grid:
            print(f"{run.index:>4}  {run.name:<28} {_state(grid, run)}")
    elif index is not None:
        (run,) = (run for run in grid if run.index == index)
        if not grid.is_finished(run):
            grid.check_data([run])
            _train(grid, run)
        if rank() == 0:
            write_tables(output)
    else:
        try:
            if not table_only:
                _train_all(grid, jobs)
        finally:  # of the runs that have finished, whatever became of the others
            if table_only or any(records(output)):
                print(f"\n{write_tables(output)}\n{output / PAGE}")
        if others := {run.name for run, _ in records(output)} - {run.name for run in grid}:
            print(f"note: {', '.join(sorted(others))} in {output} are no runs of this sweep, but in its table")


def _check(grid: Grid, jobs: int, index: int | None, *, table_only: bool) -> None:
    """Raise ValueError for whatever would end a run, or make it another run than its name says, before one begins."""
    if not (grid.variants and grid.seeds and grid.fit):
        raise ValueError("a sweep needs variants, seeds and the files of fit, one of each at least")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if index is not None and table_only:
        raise ValueError("index trains a run, table_only trains none: give one of them")
    for name in (grid.name, *grid.variants):
        if not NAME.fullmatch(name):
            raise ValueError(
                f"a sweep and its variants name folders: letters, digits and . _ - +, of which the first is a letter or"
                f" a digit; got {name!r}"
            )
    count = len(grid.variants) * len(grid.seeds)
    if min(grid.seeds) < 0:
        raise ValueError(f"seeds must be at least 0, got {grid.seeds}")
    if len(set(grid.seeds)) < len(grid.seeds):
        raise ValueError(f"seeds must differ, got {grid.seeds}")
    if index is not None and not 0 <= index < count:
        raise ValueError(f"index must be from 0 to {count - 1}, since the sweep has {count} runs; got {index}")
    grid.check()


def _state(grid: Grid, run: Run) -> str:
    if grid.is_finished(run):
        return "finished"
    summary = read_summary(grid.folder(run))
    return f"{summary['status']} after {summary['steps']} of {summary['max_steps']} steps" if summary else "to do"


def _train(grid: Grid, run: Run) -> None:
    """Train in this process, go on where it was, and keep the record."""
    folder, arguments = grid.folder(run), grid.arguments(run)
    with _alone_in(folder):
        if not _is_trained(grid, run):
            with _as_command([os.path.relpath(_CLI), "fit", *arguments, "--ckpt_path=last"]):
                main()
        if rank():
            return
        if not _is_trained(grid, run):
            raise ValueError(f"{run.name} has stopped before its last step: the same call goes on")
        if grid.lengths:
            config = grid.config(run)
            data, on_cpu = Path(config["data"]["init_args"]["path"]), config["trainer"]["accelerator"] == "cpu"
            device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
            evaluate_lengths({run.name: folder / "model"}, data, grid.lengths, output=folder, device=device)
        keep_record(run, folder, grid.output)


def _is_trained(grid: Grid, run: Run) -> bool:
    summary = read_summary(grid.folder(run))
    return summary.get("status") == "finished" and summary["steps"] >= grid.config(run)["trainer"]["max_steps"]


@contextmanager
def _as_command(argv: list[str]) -> Iterator[None]:
    """Let this be the command of the process, by which Lightning starts the further ranks of a node."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of `folder`. Raises ValueError where one is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0) if rank() == 0 else nullcontext():
            yield
    except Timeout:
        raise ValueError(f"another sweep is at work in {folder}: wait for it or stop it") from None


def _train_all(grid: Grid, jobs: int) -> None:
    """Train all that is not finished in processes of their own. Raises ValueError where some fail, after the others."""
    waiting = [run for run in grid if not grid.is_finished(run)]
    grid.check_data(waiting)
    at_work: dict[int, tuple[BaseProcess, Run]] = {}  # by place, which says what share of the GPUs is theirs
    failed: list[str] = []
    threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // jobs))
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        with _Progress(grid) as progress:
            while waiting or at_work:
                for place in [place for place in range(jobs) if place not in at_work][: len(waiting)]:
                    arguments = (grid, run := waiting.pop(0), threads, share_of_gpus(place, jobs, visible_gpus()))
                    process = get_context("spawn").Process(target=_in_a_process, args=arguments)
                    process.start()
                    at_work[place] = process, run
                ended = wait([process.sentinel for process, _ in at_work.values()], timeout=1)
                for place, (process, run) in [*at_work.items()]:
                    if process.sentinel in ended:
                        del at_work[place]
                        process.join()
                        if process.exitcode:
                            failed.append(f"{run.name} ({grid.folder(run) / LOG})")
                progress.show([run for _, run in at_work.values()], failed)
    finally:
        for process, _ in at_work.values():  # after Ctrl-C: they save before they end
            process.terminate()
        for process, _ in at_work.values():
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise ValueError(f"{len(failed)} of the runs did not end well; the same call goes on: {', '.join(failed)}")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else [x for x in named.split(",") if x]


def share_of_gpus(place: int, jobs: int, gpus: list[str]) -> list[str]:
    """The GPUs of the job at `place` among so many: each has its own, as long as there are enough."""
    return gpus[place::jobs] or gpus[place % len(gpus) :][:1] if gpus else []


def _in_a_process(grid: Grid, run: Run, threads: int, gpus: list[str]) -> None:
    """Train, with all that is said going to a file."""
    folder = grid.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        _train(grid, run)
    except ValueError as error:
        sys.exit(f"error: {error}")


class _Progress:
    """A bar over the optimiser steps of all runs; summaries, written at every checkpoint, tell how far each is."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.steps = {run: max(1, grid.config(run)["trainer"]["max_steps"]) for run in grid}

    def __enter__(self) -> "_Progress":
        self.bar = tqdm(total=sum(self.steps.values()), initial=self._done(), desc=self.grid.name, unit="step")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, at_work: list[Run], failed: list[str]) -> None:
        """Say how far it is."""
        self.bar.update(self._done() - self.bar.n)
        words = [run.name for run in at_work] + [f"{len(failed)} failed"] * bool(failed)
        self.bar.set_postfix_str(", ".join(words), refresh=False)

    def _done(self) -> int:
        return sum(
            steps if self.grid.is_finished(run) else min(steps, read_summary(self.grid.folder(run)).get("steps", 0))
            for run, steps in self.steps.items()
        )
