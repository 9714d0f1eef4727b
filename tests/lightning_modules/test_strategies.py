"""Every strategy trains as one process does: the same losses, the same norms of gradients, the same exported model.

The processes join over gloo, as torchrun would start them. Targets are spread unevenly over ranks and micro batches:
ends of text are scattered among random tokens, and the last step of an epoch holds 3 samples instead of 8.
"""

import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import FSDPStrategy as LightningFSDP
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel

from datamodules.tokens import TokenDataModule
from lightning_modules import (
    ExportModel,
    FSDP2Strategy,
    FSDPStrategy,
    LanguageModel,
    MemoryLengthHistogram,
    OptimizerConfig,
)
from rat import CausalLM, ModelConfig
from rat.layers import Block

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
    compile: bool = False
    precision: str = "32-true"


class FSDPOnCPU(FSDPStrategy):
    """PyTorch's FSDP runs on CPUs once it is told so, which Lightning cannot. Whole weights it cannot gather there."""

    def _configure_launcher(self) -> None:
        LightningFSDP._configure_launcher(self)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        wrapped = FullyShardedDataParallel(model, device_id=self.root_device, **self.kwargs)
        apply_activation_checkpointing(wrapped, **self._activation_checkpointing_kwargs)
        return wrapped


class Outcome(NamedTuple):
    """What a run logged at every step, and its exported weights."""

    loss: list[float]
    grad_norm: list[float]
    memory_lengths: list[float]
    weights: dict[str, torch.Tensor]


def exported(run: Run) -> bool:
    return run.strategy != "fsdp"


def train(run: Run, shards: Path, world_size: int = 1) -> None:
    torch.manual_seed(0)
    made = {"single": lambda: "auto", "ddp": DDPStrategy, "fsdp2": FSDP2Strategy,
            "fsdp": partial(FSDPOnCPU, auto_wrap_policy={Block}, activation_checkpointing_policy={Block}),
            "hybrid": partial(FSDP2Strategy, replicas=2)}  # fmt: skip
    config = ModelConfig(
        vocab_size=64, d_model=16, num_layers=3, num_heads=2, num_groups=1, pattern=PATTERNS[run.pattern],
        chunk_size=4, window_size=5, max_seq_len=SEQ_LEN,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=made[run.strategy](), precision=run.precision, max_steps=STEPS,
        log_every_n_steps=1,
        gradient_clip_val=CLIP, use_distributed_sampler=False, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.folder,
        logger=TensorBoardLogger(run.folder, name="", version=""),
        callbacks=[MemoryLengthHistogram(every_n_steps=9), *([ExportModel(run.folder / "model")] * exported(run))],
    )  # fmt: skip
    data = TokenDataModule(
        shards, seq_len=SEQ_LEN, max_tokens=SAMPLES * SEQ_LEN + 1, batch_size=GLOBAL_BATCH // 2 // world_size
    )
    optimizer = OptimizerConfig(peak_lr=1e-3)
    trainer.fit(
        LanguageModel(
            config,
            optimizer,
            global_batch_size=GLOBAL_BATCH,
            activation_checkpointing=run.activation_checkpointing,
            compile=run.compile,
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


def outcome(run: Run) -> Outcome:
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    scalars = ([event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "grad_norm"))
    histograms = [event.histogram_value for tag in events.Tags()["histograms"] for event in events.Histograms(tag)]
    weights = CausalLM.from_pretrained(run.folder / "model").state_dict() if exported(run) else {}
    return Outcome(*scalars, [value for h in histograms for value in (h.min, h.max, h.sum)], weights)


@pytest.fixture(scope="module")
def alone(random_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [Run(folder / pattern, pattern) for pattern in PATTERNS]
    for run in runs:
        train(run, random_shards)
    return {run.pattern: outcome(run) for run in runs}


def assert_alike(found: Outcome, expected: Outcome) -> None:
    assert len(expected.loss) == STEPS
    assert min(expected.grad_norm) > CLIP, "clipping must have something to do"
    assert found.loss == pytest.approx(expected.loss, rel=0, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.memory_lengths == pytest.approx(expected.memory_lengths, rel=1e-5)
    for name, x in found.weights.items():
        torch.testing.assert_close(x, expected.weights[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_strategies_train_alike(
    alone: dict[str, Outcome], random_shards: Path, tmp_path: Path, world_size: int
) -> None:
    runs = [Run(tmp_path / s / p, p, s) for p in PATTERNS for s in ("ddp", "fsdp2")]
    runs.append(Run(tmp_path / "fsdp", "hybrid", "fsdp"))
    runs.append(Run(tmp_path / "replicated", "hybrid", "hybrid", activation_checkpointing=True))
    low = Run(tmp_path / "low", "hybrid", "fsdp2", precision="bf16-mixed")
    train_together(world_size, [*runs, low], random_shards)
    for run in runs:
        assert_alike(outcome(run), alone[run.pattern])
    differences = [abs(a - b) for a, b in zip(outcome(low).loss, alone["hybrid"].loss, strict=True)]
    assert 1e-5 < max(differences) < 5e-3, "gathered weights are in bf16"


@pytest.mark.slow
def test_compiled_blocks_train_alike(alone: dict[str, Outcome], random_shards: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "hybrid", "fsdp2", compile=True, activation_checkpointing=True)
    train_together(2, [run], random_shards)
    assert_alike(outcome(run), alone["hybrid"])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ModelParallelStrategy(1, 1), "ModelParallelStrategy does not say how to shard the model: take"),
        (FSDP2Strategy(replicas=2), "replicas 2 do not divide 1 devices: choose a divisor"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    config: ModelConfig, ragged: Any, make_trainer: Any, strategy: ModelParallelStrategy, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(strategy=strategy, devices=1).fit(LanguageModel(config), ragged())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
