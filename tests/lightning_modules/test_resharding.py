"""A run goes on under another strategy from what was written under the one before, as if it had been alone all along.

Tensor parallelism gives weights shapes of their own. One process trains two steps, others go on from its file under
one strategy after another, each from what the last one wrote, and whatever they wrote one process goes on from.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from ranks import together

from datamodules.tokens import TokenDataModule
from lightning_modules import FSDP2Strategy, FSDPStrategy, LanguageModel, LastCheckpoint, OptimizerConfig
from lightning_modules.checkpoints import AtomicCheckpointIO
from rat import CausalLM, ModelConfig
from rat_cli.convert import convert, model_of, read_checkpoint
from rat_cli.model_forms import start_of_training

CONFIG = ModelConfig(
    vocab_size=64, d_model=24, num_layers=3, num_heads=6, num_groups=2, pattern=["rat", "attention", "rnn"],
    chunk_size=4, max_seq_len=14,
)  # fmt: skip
TENSOR = partial(FSDP2Strategy, tensor_parallel_size=2)
STRATEGIES: dict[str, Callable[[], Any]] = {
    "alone": lambda: "auto",
    "tensor": TENSOR,
    "fsdp2": FSDP2Strategy,
    "tensor-replicas": partial(TENSOR, replicas=2),
    "tensor-file": partial(TENSOR, save_distributed_checkpoint=False),
}
# Each goes on from what the one before has written; on 4 ranks two by two share heads.
LEGS = {2: ["tensor", "tensor", "fsdp2", "tensor-file"], 4: ["tensor", "tensor-replicas", "fsdp2", "tensor-file"]}
STARTS = ["fsdp2", "tensor"]  # from a model that became a checkpoint
STEPS = 2  # of a leg


def fit(strategy: str, start: Path | None, folder: Path, steps: int, shards: Path, world_size: int = 1) -> Path:
    """Train up to so many steps, on from a checkpoint; where the last one is then."""
    torch.manual_seed(0)
    data_ranks = world_size // 2 if strategy.startswith("tensor") else world_size
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=STRATEGIES[strategy](), max_steps=steps, gradient_clip_val=0.2,
        use_distributed_sampler=False, limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, logger=False, callbacks=[LastCheckpoint(100, folder)],
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    data = TokenDataModule(shards, seq_len=14, batch_size=4 // data_ranks)
    constant = OptimizerConfig(peak_lr=1e-3, eta_min=1e-3, warmup_fraction=0)
    trainer.fit(LanguageModel(CONFIG, constant, global_batch_size=8), data, ckpt_path=start)
    return folder / "last.ckpt"


def legs(world_size: int, start: Path, folder: Path, shards: Path) -> None:
    for i, strategy in enumerate(LEGS[world_size]):
        start = fit(strategy, start, folder / str(i), STEPS * (i + 2), shards, world_size)
    for strategy in STARTS:
        fit(strategy, folder / "start.ckpt", folder / strategy, STEPS, shards, world_size)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def written(
    random_shards: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[Path]:
    """The checkpoints of all legs of so many ranks."""
    folder = tmp_path_factory.mktemp("legs")
    first = fit("alone", None, folder / "first", STEPS, random_shards)
    convert(first, folder / "model", "model")
    convert(folder / "model", folder / "start.ckpt", "file")
    together(request.param, legs, request.param, first, folder, random_shards)
    return [folder / str(i) / "last.ckpt" for i in range(4)]


@pytest.fixture(scope="module")
def alone(random_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The checkpoint of a run in one process after so many steps."""
    folder, path, paths = tmp_path_factory.mktemp("alone"), None, {}
    for steps in range(STEPS, 7 * STEPS, STEPS):
        paths[steps] = path = fit("alone", path, folder / str(steps), steps, random_shards)
    return paths.__getitem__


def assert_same_training(found: Path, expected: Path) -> None:
    """Weights and what the optimiser keeps, in the shapes of one process."""
    ours, theirs = (AtomicCheckpointIO().load_checkpoint(path, "cpu", weights_only=True) for path in (found, expected))
    assert ours["global_step"] == theirs["global_step"]
    close = partial(torch.testing.assert_close, rtol=0)
    close(ours["state_dict"], theirs["state_dict"], atol=1e-5)
    states = [content["optimizer_states"][0]["state"] for content in (ours, theirs)]
    assert len(states[0]) == len(list(ours["state_dict"]))
    close(*states, atol=1e-6)
    groups = [content["optimizer_states"][0]["param_groups"] for content in (ours, theirs)]
    assert [group["params"] for group in groups[0]] == [group["params"] for group in groups[1]]


def test_every_strategy_goes_on_from_every_checkpoint(written: list[Path], alone: Callable[[int], Path]) -> None:
    assert [path.is_dir() for path in written] == [True, True, True, False]
    for path, steps in zip(written, count(2 * STEPS, STEPS), strict=False):
        assert_same_training(path, alone(steps))


def test_training_starts_from_a_model_that_became_a_checkpoint(
    written: list[Path], random_shards: Path, tmp_path: Path
) -> None:
    folder = written[0].parents[1]
    expected = fit("alone", folder / "start.ckpt", tmp_path, STEPS, random_shards)
    for strategy in STARTS:
        assert_same_training(folder / strategy / "last.ckpt", expected)


def test_fsdp_refuses_to_start_from_one(tmp_path: Path) -> None:
    torch.save(start_of_training(CausalLM(CONFIG)), tmp_path / "start.ckpt")
    strategy = FSDPStrategy()
    strategy._lightning_module = LanguageModel(CONFIG)
    strategy._optimizers = [torch.optim.SGD([torch.zeros(1)])]
    with pytest.raises(ValueError, match=r"no optimiser, which FSDP needs: give the model itself as model\.init_from"):
        strategy.load_checkpoint(tmp_path / "start.ckpt")


@pytest.mark.parametrize("leg", [1, 3])
def test_one_process_goes_on_from_them(
    written: list[Path], alone: Callable[[int], Path], random_shards: Path, tmp_path: Path, leg: int
) -> None:
    steps = STEPS * (leg + 3)
    assert_same_training(fit("alone", written[leg], tmp_path, steps, random_shards), alone(steps))


def test_they_are_converted(written: list[Path], alone: Callable[[int], Path], tmp_path: Path) -> None:
    folder, expected = written[0], alone(2 * STEPS)
    convert(folder, tmp_path / "file.ckpt", "file")
    convert(folder, tmp_path / "shards.ckpt", "shards")
    for path in (tmp_path / "file.ckpt", tmp_path / "shards.ckpt"):
        assert_same_training(path, expected)
    wanted = model_of(read_checkpoint(expected), expected)
    convert(folder, tmp_path / "model", "model")
    found = type(wanted).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=1e-5)
