"""Runs that are killed, interrupted, out of disk or short of a rank end as if nothing had happened to them.

They are `cli.py fit` in processes of their own, forked from one that has imported everything, so that a start takes a
second. Sample i of the data holds nothing but the token i + 1, and every run notes what it trained on.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import free_port

from datamodules.shards import ShardWriter
from lightning_modules.atomic import standing
from lightning_modules.checkpoints import AtomicCheckpointIO
from rat_cli.convert import convert

SAMPLES, SEQ_LEN, GLOBAL_BATCH, STEPS = 159, 8, 4, 100  # 39.75 steps an epoch
CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  strategy: {strategy}
  devices: {ranks}
  max_steps: {steps}
  max_epochs: -1
  limit_val_batches: 0
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  default_root_dir: {folder}
  plugins: {plugins}
  callbacks:
    - class_path: {witness}
      init_args: {{folder: {folder}, seconds: {seconds}}}
    - class_path: lightning_modules.LastCheckpoint
      init_args: {{every_n_train_steps: {every}, dirpath: {folder}/checkpoints}}
model:
  model: {{vocab_size: 160, d_model: {d_model}, num_layers: 2, num_heads: 2, pattern: [rat, attention], chunk_size: 4}}
  optimizer: {{peak_lr: 3.0e-4}}
  global_batch_size: 4
  kernel_backend: portable
data:
  class_path: datamodules.tokens.TokenDataModule
  init_args: {{path: {data}, seq_len: 8, batch_size: {batch_size}}}
"""


class Witness(Callback):
    """Notes the samples of every micro batch, after which it takes its time."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples = [token - 1 for token in batch["input_ids"][:, 0].tolist()]
        with (self.folder / f"seen.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.current_epoch} {batch_idx} {' '.join(map(str, samples))}\n")
        time.sleep(self.seconds)


def train(arguments: list[str], log: Path, environment: dict[str, str], largest_file: int | None) -> None:
    """A process: `cli.py` with these arguments."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    from rat_cli.main import main

    main(arguments)


class Run:
    """A run with a folder of its own, which can be started again and again."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.checkpoint = folder / "checkpoints" / "last.ckpt"
        self.processes: list[BaseProcess] = []
        folder.mkdir()

    def start(
        self, ranks: int = 1, strategy: str = "auto", plugins: str = "null", seconds: float = 0.0, every: int = 25,
        largest_file: int | None = None, d_model: int = 16,
    ) -> list[BaseProcess]:  # fmt: skip
        """Processes that train, on from the last checkpoint if there is one."""
        config = self.folder / "config.in.yaml"
        text = CONFIG.format(
            folder=self.folder, data=self.data, witness=f"{Witness.__module__}.Witness", seconds=seconds,
            ranks=ranks, strategy=strategy, plugins=plugins, every=every, steps=STEPS, batch_size=2 // ranks,
            d_model=d_model,
        )  # fmt: skip
        config.write_text(text)
        arguments = ["fit", "--config", str(config), "--ckpt_path", "last"]
        context = multiprocessing.get_context("forkserver")
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"} if ranks > 1 else {}
        for rank in range(ranks):
            environment = together | {"LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = context.Process(target=train, args=(arguments, self.log(rank), environment, largest_file))
            process.start()
            self.processes.append(process)
        return self.processes[-ranks:]

    def finish(self, **options: Any) -> None:
        """Train to the end."""
        for rank, process in enumerate(self.start(**options)):
            process.join(300)
            assert process.exitcode == 0, self.log(rank).read_text()

    def train_until(self, step: int, **options: Any) -> list[BaseProcess]:
        """Processes that have got as far as the checkpoint of this optimiser step, and go on."""
        processes = self.start(seconds=0.01, every=1, **options)
        while self.step() < step:
            assert all(process.is_alive() for process in processes), self.log(0).read_text()
            time.sleep(0.02)
        return processes

    def log(self, rank: int) -> Path:
        return self.folder / f"log.{rank}"

    def notes(self) -> list[list[int]]:
        """Lines of all ranks: epoch, micro batch, samples."""
        lines = [line for file in sorted(self.folder.glob("seen.*")) for line in file.read_text().splitlines()]
        return [[int(number) for number in line.split()] for line in lines]

    def state(self) -> dict[str, Any]:
        return AtomicCheckpointIO().load_checkpoint(self.checkpoint, "cpu", weights_only=True)

    def step(self) -> int:
        """The last checkpoint's, also while another one takes its place."""
        path = standing(self.checkpoint)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):  # between two looks
            return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)["global_step"]
        return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    for split in ("train", "val"):
        with ShardWriter(folder / split, vocab_size=SAMPLES + 1, eos_id=0) as writer:
            tokens = np.repeat(np.arange(SAMPLES), SEQ_LEN) + 1
            writer.write(np.append(tokens, SAMPLES), num_bytes=len(tokens) + 1, num_chars=len(tokens) + 1)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """An uninterrupted run in one process."""
    run = Run(tmp_path_factory.mktemp("runs") / "whole", data)
    run.finish()
    return run


@pytest.fixture
def make_run(tmp_path: Path, data: Path) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def make() -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", data))
        return runs[-1]

    yield make
    for process in (process for run in runs for process in run.processes):
        process.kill()
        process.join()


def assert_same_training(run: Run, whole: Run, tolerance: float = 0.0) -> None:
    """Weights and optimiser are equal, and every sample was trained on once an epoch."""
    ours, theirs = run.state(), whole.state()
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for name, x in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], x, rtol=0, atol=tolerance)
    if not tolerance:
        for number, state in theirs["optimizer_states"][0]["state"].items():
            for name, x in state.items():
                assert torch.equal(ours["optimizer_states"][0]["state"][number][name], x)
    assert steps(run) == steps(whole)
    assert sorted(i for (epoch, _), seen in steps(run).items() if epoch == 0 for i in seen) == [-1, *range(SAMPLES)]


def steps(run: Run) -> dict[tuple[int, int], list[int]]:
    """The samples by epoch and optimiser step; what was trained on again must have been the same."""
    found: dict[tuple[int, int], set[int]] = {}
    for epoch, micro_batch, *samples in run.notes():
        found.setdefault((epoch, micro_batch // 2), set()).update(samples)
    assert all(len(samples) == GLOBAL_BATCH for samples in found.values())
    return {step: sorted(samples) for step, samples in found.items()}


def kill_again_and_again(run: Run, times: int, **options: Any) -> None:
    draw, reached = random.Random(times), []
    for _ in range(times):
        processes = run.train_until(run.step() + 1, **options)
        time.sleep(draw.uniform(0, 0.3))
        for process in processes:
            assert process.is_alive(), "it ended before it could be killed: make it longer"
            process.kill()
            process.join()
        reached.append(run.step())
    assert reached == sorted(set(reached))
    assert reached[-1] < STEPS


BACKGROUND = "[lightning_modules.BackgroundCheckpointIO]"
FSDP2 = "{class_path: lightning_modules.FSDP2Strategy}"
MakeRun = Callable[[], Run]


@pytest.mark.parametrize(
    ("times", "plugins"),
    [
        (3, "null"),
        pytest.param(10, "null", marks=pytest.mark.slow),
        pytest.param(10, BACKGROUND, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(make_run: MakeRun, whole: Run, times: int, plugins: str) -> None:
    run = make_run()
    kill_again_and_again(run, times, plugins=plugins)
    run.finish(plugins=plugins)
    assert_same_training(run, whole)


@pytest.mark.slow
def test_two_ranks_killed_at_any_moment_of_writing_their_shards(make_run: MakeRun, whole: Run) -> None:
    run, two = make_run(), {"ranks": 2, "strategy": FSDP2}
    kill_again_and_again(run, 5, **two)
    run.finish(**two)
    assert_same_training(run, whole, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_interrupted_by_a_signal(make_run: MakeRun, whole: Run, sent: signal.Signals) -> None:
    run = make_run()
    (process,) = run.train_until(5)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode is not None
    assert run.step() < STEPS
    run.finish()
    assert_same_training(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("plugins", ["null", BACKGROUND])
def test_a_disk_that_fills_up_during_a_save(make_run: MakeRun, whole: Run, plugins: str) -> None:
    run = make_run()
    (process,) = run.train_until(3)
    process.kill()
    process.join()
    before = run.checkpoint.read_bytes()
    (process,) = run.start(plugins=plugins, every=1, largest_file=len(before) // 2)
    process.join(60)
    assert process.exitcode == 1
    assert run.log(0).read_text().splitlines()[-1] == f"error: [Errno 27] File too large: '{run.checkpoint}'"
    assert run.checkpoint.read_bytes() == before
    assert [path.name for path in run.checkpoint.parent.iterdir()] == ["last.ckpt"]
    run.finish()
    assert_same_training(run, whole)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_of_shards(make_run: MakeRun, whole: Run) -> None:
    run, two = make_run(), {"ranks": 2, "strategy": FSDP2}
    for process in run.train_until(3, **two):
        process.kill()
        process.join()
    run.checkpoint = standing(run.checkpoint)
    before = run.state()
    for rank, process in enumerate(run.start(every=1, largest_file=20_000, **two)):
        process.join(60)
        assert process.exitcode == 1
        assert "error: [Errno 27] File too large" in run.log(rank).read_text()
    assert run.state()["global_step"] == before["global_step"]
    for name, x in before["state_dict"].items():
        assert torch.equal(run.state()["state_dict"][name], x)
    run.checkpoint = run.folder / "checkpoints" / "last.ckpt"
    run.finish(**two)
    assert_same_training(run, whole, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", FSDP2])
def test_a_lost_rank_ends_the_others_and_the_run_goes_on(make_run: MakeRun, whole: Run, strategy: str) -> None:
    two = {"ranks": 2, "strategy": strategy}
    run, uninterrupted = make_run(), make_run()
    first, second = run.train_until(10, **two)
    second.kill()
    first.join(60)
    assert first.exitcode not in (0, None), "it waits for the one that is gone"
    assert run.step() < STEPS
    run.finish(**two)
    uninterrupted.finish(**two)
    assert_same_training(run, uninterrupted, tolerance=1e-6)
    assert_same_training(run, whole, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", FSDP2])
def test_killed_on_one_rank_and_two_and_one_again(make_run: MakeRun, whole: Run, strategy: str) -> None:
    run = make_run()
    for step, options in ((20, {}), (50, {"ranks": 2, "strategy": strategy}), (80, {})):
        for process in run.train_until(step, **options):
            process.kill()
            process.join()
    run.finish(ranks=2, strategy=strategy)
    assert_same_training(run, whole, tolerance=1e-5)


@pytest.mark.slow
def test_a_converted_checkpoint_goes_on(make_run: MakeRun, whole: Run, tmp_path: Path) -> None:
    run = make_run()
    forms: tuple[Literal["shards", "file"], ...] = ("shards", "file")
    for form, step, options in zip(forms, (20, 50), ({}, {"ranks": 2, "strategy": FSDP2}), strict=True):
        for process in run.train_until(step, **options):
            process.kill()
            process.join()
        before = standing(run.checkpoint).rename(tmp_path / f"before.{form}.ckpt")
        convert(before, run.checkpoint, form)
        assert run.checkpoint.is_dir() == (form == "shards")
    run.finish()
    assert_same_training(run, whole, tolerance=1e-5)


@pytest.mark.slow
def test_what_shards_cannot_be_resumed_with_is_named(make_run: MakeRun) -> None:
    run = make_run()

    def says(**options: Any) -> str:
        (process,) = run.start(strategy=FSDP2, **options)
        process.join(60)
        assert process.exitcode == 1
        return run.log(0).read_text().splitlines()[-1]

    assert says(plugins=BACKGROUND).startswith("error: FSDP2Strategy writes its shards itself, which Background")
    (process,) = run.train_until(3, strategy=FSDP2)
    process.kill()
    process.join()
    assert says(d_model=32).startswith("error: the checkpoint holds another model than the config: d_model is 16, not")
    next(standing(run.checkpoint).glob("*.distcp")).unlink()
    assert "is damaged or incomplete: copy it again" in says()
