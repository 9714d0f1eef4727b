"""Every strategy trains as one process does: the same losses, the same norms of gradients, the same exported model.

The processes join over gloo, as torchrun would start them. Targets are spread unevenly over ranks and micro batches:
ends of text are scattered among random tokens, and the last step of an epoch holds 3 samples instead of 8.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import FSDPStrategy as LightningFSDP
from ranks import together
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel

from datamodules.tokens import TokenDataModule
from lightning_modules import (
    BadStepGuard,
    ExportModel,
    FSDP2Strategy,
    FSDPStrategy,
    LanguageModel,
    MemoryLengthHistogram,
    OptimizerConfig,
)
from lightning_modules.bad_steps import BadStepError
from lightning_modules.checkpoints import AtomicCheckpointIO
from lightning_modules.predictions import PredictionWriter
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
    saves: bool = False  # after half of the steps
    resumed: Path | None = None


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
    tokens: list[float]
    weights: dict[str, torch.Tensor]


def exported(run: Run) -> bool:
    return run.strategy != "fsdp"


def sharing(run: Run) -> int:
    """How many processes are given the same rows."""
    return {"context": 2, "context-copies": 2, "tensor": 2, "both": 4}.get(run.strategy, 1)


def config_of(pattern: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, d_model=16, num_layers=3, num_heads=4, num_groups=2, pattern=PATTERNS[pattern],
        chunk_size=4, window_size=5, max_seq_len=SEQ_LEN,
    )  # fmt: skip


def make_trainer(run: Run, world_size: int, **options: Any) -> Trainer:
    made = {"single": lambda: "auto", "ddp": DDPStrategy, "fsdp2": FSDP2Strategy,
            "fsdp": partial(FSDPOnCPU, auto_wrap_policy={Block}, activation_checkpointing_policy={Block}),
            "hybrid": partial(FSDP2Strategy, replicas=2),
            "context": partial(FSDP2Strategy, context_parallel_size=2),
            "context-copies": partial(FSDP2Strategy, context_parallel_size=2, replicas=2),
            "tensor": partial(FSDP2Strategy, tensor_parallel_size=2),
            "both": partial(FSDP2Strategy, context_parallel_size=2, tensor_parallel_size=2)}  # fmt: skip
    return Trainer(
        accelerator="cpu", devices=world_size, strategy=made[run.strategy](), precision=run.precision,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=run.folder, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip


def train(run: Run, shards: Path, world_size: int = 1) -> None:
    torch.manual_seed(0)
    callbacks: list[Callback] = [MemoryLengthHistogram(every_n_steps=9)]
    if exported(run):
        callbacks.append(ExportModel(run.folder / "model"))
    if run.saves:
        callbacks.append(ModelCheckpoint(run.folder, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1))
    trainer = make_trainer(
        run, world_size, max_steps=STEPS, log_every_n_steps=1, gradient_clip_val=CLIP, limit_val_batches=0,
        logger=TensorBoardLogger(run.folder, name="", version=""), callbacks=callbacks, enable_checkpointing=run.saves,
    )  # fmt: skip
    data = TokenDataModule(
        shards, seq_len=SEQ_LEN, max_tokens=SAMPLES * SEQ_LEN + 1,
        batch_size=GLOBAL_BATCH // 2 // world_size * sharing(run),
    )  # fmt: skip
    module = LanguageModel(
        config_of(run.pattern), OptimizerConfig(peak_lr=1e-3), global_batch_size=GLOBAL_BATCH,
        activation_checkpointing=run.activation_checkpointing, compile=run.compile,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=run.resumed)


def look(run: Run, shards: Path, world_size: int = 1) -> None:
    """Validate and predict with a model that nobody has trained; write what was found."""
    found = []
    for accuracy in (False, True):
        torch.manual_seed(0)
        module = LanguageModel(config_of(run.pattern), accuracy=accuracy)
        trainer = make_trainer(
            run, world_size, logger=False, callbacks=PredictionWriter(run.folder / f"{accuracy}.jsonl")
        )
        data = TokenDataModule(shards, seq_len=SEQ_LEN, batch_size=5)
        found += trainer.validate(module, data, verbose=False)
        trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        (run.folder / "found.json").write_text(json.dumps(found))


def refuse(folder: Path, shards: Path, world_size: int) -> None:
    """Which rows or heads cannot be dealt out is told before there is a model."""
    for strategy, options, changed, message in (
        ("context", {"mask_documents": True}, {}, "mask_documents gives rows with document_ids.* set it to false"),
        ("context", {}, {"chunk_size": SEQ_LEN}, "rows of 14 tokens are 1 chunks of 14, and 2 ranks need one each"),
        ("tensor", {}, {"num_groups": 1}, "2 tensor-parallel ranks do not divide num_groups 1: choose a divisor"),
    ):
        module = LanguageModel(replace(config_of("hybrid"), **changed))
        data = TokenDataModule(shards, seq_len=SEQ_LEN, **options)
        with pytest.raises(ValueError, match=message):
            make_trainer(Run(folder, "hybrid", strategy), world_size, logger=False, max_steps=1).fit(module, data)
        assert module.model is None


class Poison(Callback):
    """A loss that is no number, in the second step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.model.norm.weight.fill_(float("nan"))


def stop(run: Run, shards: Path, world_size: int) -> None:
    """A bad step stops all ranks, and tells of a row once."""
    options = {"logger": False, "max_steps": 3, "limit_val_batches": 0, "callbacks": [Poison(), BadStepGuard()]}
    data = TokenDataModule(shards, seq_len=SEQ_LEN, batch_size=2)
    with pytest.raises(BadStepError, match="step 1: the loss is nan"):
        make_trainer(run, world_size, **options).fit(LanguageModel(config_of(run.pattern)), data)


class PoisonOneRank(Callback):
    """A gradient that is no number, of the heads of rank 1 alone, in the second step, which is to be left out."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        self.before = self._state(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        if (trainer.global_step, trainer.global_rank) == (1, 1):
            pl_module.model.layers[0].mixer.in_proj.weight.grad.to_local().fill_(float("nan"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        unchanged = [torch.equal(a, b) for a, b in zip(self.before, self._state(pl_module), strict=True)]
        assert all(unchanged) if batch_idx == 1 else not any(unchanged)

    def _state(self, pl_module: LanguageModel) -> list[torch.Tensor]:
        weights = list(pl_module.parameters())
        kept = pl_module.optimizers().optimizer.state
        means = [kept[p].get("exp_avg", torch.full_like(p, float("nan"))) for p in weights]
        return [x.detach().to_local().clone() for x in (*weights, *means)]


def skip(run: Run, shards: Path, world_size: int) -> None:
    """A bad step of one rank's heads is left out on all ranks."""
    guard = BadStepGuard(on_nan="skip")
    options = {"logger": False, "max_steps": 3, "limit_val_batches": 0, "callbacks": [PoisonOneRank(), guard]}
    data = TokenDataModule(shards, seq_len=SEQ_LEN, batch_size=2)
    make_trainer(run, world_size, **options).fit(LanguageModel(config_of(run.pattern)), data)
    assert guard.skipped == 1


Work = Callable[[Path, int], None]


def do_all(work: Sequence[Work], shards: Path, world_size: int) -> None:
    for do in work:
        do(shards, world_size)


def train_together(world_size: int, runs: Sequence[Run], shards: Path) -> None:
    together(world_size, do_all, [partial(train, run) for run in runs], shards, world_size)


def outcome(run: Run) -> Outcome:
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    loss, norm, tokens = (
        [event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "grad_norm", "tokens")
    )
    histograms = [event.histogram_value for tag in events.Tags()["histograms"] for event in events.Histograms(tag)]
    weights = CausalLM.from_pretrained(run.folder / "model").state_dict() if exported(run) else {}
    return Outcome(loss, norm, [value for h in histograms for value in (h.min, h.max, h.sum)], tokens, weights)


@pytest.fixture(scope="module")
def alone(random_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [Run(folder / pattern, pattern) for pattern in PATTERNS]
    for run in runs:
        train(run, random_shards)
    return {run.pattern: outcome(run) for run in runs}


def assert_alike(found: Outcome, expected: Outcome, whole_rows: bool = True) -> None:
    assert len(expected.loss) == STEPS
    assert min(expected.grad_norm) > CLIP, "clipping must have something to do"
    made = slice(STEPS - len(found.loss), STEPS)
    assert found.loss == pytest.approx(expected.loss[made], rel=0, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm[made], rel=1e-4)
    assert found.tokens == expected.tokens[made]
    if whole_rows:
        assert found.memory_lengths == pytest.approx(expected.memory_lengths, rel=1e-5)
    for name, x in found.weights.items():  # AdamW divides by gradients, some of which are hardly more than rounding
        torch.testing.assert_close(x, expected.weights[name], rtol=0, atol=1e-5, msg=name)


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


FOUR = [("hybrid", "context-copies"), *((p, s) for p in PATTERNS for s in ("context", "tensor", "both"))]
SHARED = [
    (2, [("rat", "context"), ("attention", "context"), ("hybrid", "context"), ("rat", "tensor"), ("hybrid", "tensor")]),
    pytest.param(4, FOUR, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "cases"), SHARED)
def test_devices_that_share_rows_train_alike(
    alone: dict[str, Outcome], random_shards: Path, tmp_path: Path, world_size: int, cases: list[tuple[str, str]]
) -> None:
    runs = [Run(tmp_path / "-".join(case), *case) for case in cases]
    train_together(world_size, runs, random_shards)
    for run in runs:
        assert_alike(outcome(run), alone[run.pattern], whole_rows=False)


def test_runs_go_on_with_rows_shared_and_whole_again(
    alone: dict[str, Outcome], random_shards: Path, tmp_path: Path
) -> None:
    first, second = (Run(tmp_path / f"{s}-first", "hybrid", s, saves=True) for s in ("context", "ddp"))
    runs = [Run(tmp_path / s, "hybrid", s, resumed=run.folder / f"step={STEPS // 2}.ckpt")
            for s, run in (("ddp", first), ("fsdp2", first), ("context", second))]  # fmt: skip
    train_together(2, [first, second, *runs], random_shards)
    for run in runs:
        found = outcome(run)
        assert len(found.loss) == STEPS // 2
        assert_alike(found, alone["hybrid"], whole_rows=False)


def test_shared_rows_are_validated_predicted_and_judged_once(random_shards: Path, tmp_path: Path) -> None:
    cases = (("hybrid", "context"), ("attention", "context"), ("hybrid", "tensor"))
    runs = [Run(tmp_path / "-".join(case), *case) for case in cases]
    bad = [Run(tmp_path / f"bad-{strategy}", "hybrid", strategy) for strategy in ("context", "tensor")]
    judged = [partial(do, run) for run in bad for do in (stop, skip)]
    work = [*(partial(look, run) for run in runs), partial(refuse, tmp_path), *judged]
    together(2, do_all, work, random_shards, 2)
    for run in runs:
        one = Run(tmp_path / f"{run.pattern}-{run.strategy}-alone", run.pattern)
        look(one, random_shards)
        found, expected = (json.loads((r.folder / "found.json").read_text()) for r in (run, one))
        assert found == [pytest.approx(metrics, rel=1e-5) for metrics in expected]
        assert "val/sequence_accuracy" in found[1]
        assert sorted(path.name for path in run.folder.glob("*.jsonl")) == ["False.jsonl", "True.jsonl"]
        for name in ("False.jsonl", "True.jsonl"):
            lines, others = ([json.loads(line) for line in (r.folder / name).open()] for r in (run, one))
            assert lines == [pytest.approx(line, rel=1e-5) for line in others]
            assert len(lines) == 500 // SEQ_LEN
    for run in bad:
        saved = torch.load(run.folder / "bad-step-1.ckpt" / "meta.pt", weights_only=True)
        assert [found["rank"] for found in saved["bad_step"]["micro_batches"]] == [0]
        assert saved["bad_step"]["micro_batches"][0]["batch"]["input_ids"].shape == (2, SEQ_LEN)


@pytest.mark.slow
def test_compiled_blocks_train_alike(alone: dict[str, Outcome], random_shards: Path, tmp_path: Path) -> None:
    runs = [Run(tmp_path / s, "hybrid", s, compile=True, activation_checkpointing=True) for s in ("fsdp2", "context")]
    train_together(2, runs, random_shards)
    for run in runs:
        assert_alike(outcome(run), alone["hybrid"], whole_rows=sharing(run) == 1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ModelParallelStrategy(1, 1), "ModelParallelStrategy does not say how to shard the model: take"),
        (FSDP2Strategy(replicas=2), "replicas 2 do not divide 1 devices: choose a divisor"),
        (FSDP2Strategy(context_parallel_size=2), "context_parallel_size 2 x tensor_parallel_size 1 must divide 1 dev"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    config: ModelConfig, ragged: Any, tmp_path: Path, strategy: ModelParallelStrategy, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(accelerator="cpu", strategy=strategy, devices=1, logger=False, default_root_dir=tmp_path).fit(
            LanguageModel(config), ragged()
        )
