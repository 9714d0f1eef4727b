"""Every strategy trains as one process does: the same losses, the same norms of gradients, the same exported model.

The processes join over gloo, as torchrun would start them. Targets are spread unevenly over ranks and micro batches:
ends of text are scattered among random tokens, and the last step of an epoch holds 3 samples instead of 8.
"""

import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.tokens import TokenDataModule
from lightning_modules import ExportModel, FSDP2Strategy, LanguageModel, MemoryLengthHistogram, OptimizerConfig
from rat import CausalLM, ModelConfig

PATTERNS = {
    "rat": ["rat"],
    "attention": ["attention"],
    "sliding_window": ["sliding_window"],
    "hybrid": ["rat", "sliding_window", "rnn"],
}
STEPS, GLOBAL_BATCH, SEQ_LEN, SAMPLES, CLIP = 10, 8, 14, 43, 0.2


class Run(NamedTuple):
    """What is trained, how, and where its log and model go."""

    folder: Path
    pattern: str
    strategy: str = "single"
    activation_checkpointing: bool = False


class Outcome(NamedTuple):
    """What a run logged at every step, and its exported weights."""

    loss: list[float]
    grad_norm: list[float]
    memory_lengths: list[float]
    weights: dict[str, torch.Tensor]


def train(run: Run, shards: Path, world_size: int = 1) -> None:
    torch.manual_seed(0)
    made = {"single": lambda: "auto", "ddp": DDPStrategy, "fsdp2": FSDP2Strategy,
            "hybrid": partial(FSDP2Strategy, replicas=2)}  # fmt: skip
    config = ModelConfig(
        vocab_size=64, d_model=16, num_layers=3, num_heads=2, num_groups=1, pattern=PATTERNS[run.pattern],
        chunk_size=4, window_size=5, max_seq_len=SEQ_LEN,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=made[run.strategy](), max_steps=STEPS, log_every_n_steps=1,
        gradient_clip_val=CLIP, use_distributed_sampler=False, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.folder,
        logger=TensorBoardLogger(run.folder, name="", version=""),
        callbacks=[ExportModel(run.folder / "model"), MemoryLengthHistogram(every_n_steps=9)],
    )  # fmt: skip
    data = TokenDataModule(
        shards, seq_len=SEQ_LEN, max_tokens=SAMPLES * SEQ_LEN + 1, batch_size=GLOBAL_BATCH // 2 // world_size
    )
    optimizer = OptimizerConfig(peak_lr=1e-3)
    trainer.fit(
        LanguageModel(
            config, optimizer, global_batch_size=GLOBAL_BATCH, activation_checkpointing=run.activation_checkpointing
        ),
        data,
    )


def one_of_many(rank: int, world_size: int, port: int, runs: Sequence[Run], shards: Path) -> None:
    """A process that torchrun would have started."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    for run in runs:
        train(run, shards, world_size)


def train_together(world_size: int, runs: Sequence[Run], shards: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_many, (world_size, port, runs, shards), nprocs=world_size)


def outcome(folder: Path) -> Outcome:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    scalars = ([event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "grad_norm"))
    histograms = [event.histogram_value for tag in events.Tags()["histograms"] for event in events.Histograms(tag)]
    weights = CausalLM.from_pretrained(folder / "model").state_dict()
    return Outcome(*scalars, [value for h in histograms for value in (h.min, h.max, h.sum)], weights)


@pytest.fixture(scope="module")
def alone(random_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for pattern in PATTERNS:
        train(Run(folder / pattern, pattern), random_shards)
    return {pattern: outcome(folder / pattern) for pattern in PATTERNS}


def assert_alike(found: Outcome, expected: Outcome) -> None:
    assert len(expected.loss) == STEPS
    assert min(expected.grad_norm) > CLIP, "clipping must have something to do"
    assert found.loss == pytest.approx(expected.loss, rel=0, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.memory_lengths == pytest.approx(expected.memory_lengths, rel=1e-5)
    for name, x in expected.weights.items():
        torch.testing.assert_close(found.weights[name], x, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_strategies_train_alike(
    alone: dict[str, Outcome], random_shards: Path, tmp_path: Path, world_size: int
) -> None:
    runs = [Run(tmp_path / s / p, p, s) for p in PATTERNS for s in ("ddp", "fsdp2")]
    runs.append(Run(tmp_path / "replicated", "hybrid", "hybrid", activation_checkpointing=True))
    train_together(world_size, runs, random_shards)
    for run in runs:
        assert_alike(outcome(run.folder), alone[run.pattern])
