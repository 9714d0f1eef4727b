from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from datamodules.sampler import EvalSampler, TrainSampler
from datamodules.synthetic import Copying, Needles, Recall, SyntheticDataModule

TASK = Recall(vocab_size=32, num_pairs=3)
Batch = dict[str, torch.Tensor]
NAMES = ("input_ids", "labels", "distance", "items")


def made(**options: Any) -> SyntheticDataModule:
    defaults = {"task": TASK, "seq_len": 20, "train_samples": 22, "val_samples": 7, "test_samples": 5, "batch_size": 4}
    return SyntheticDataModule(**defaults | options)


def joined(batches: Any) -> Batch:
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in NAMES}


def assert_same(one: Batch, other: Batch) -> None:
    for name in NAMES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_batch_holds_its_samples_and_padding() -> None:
    for row, (input_ids, labels, distance, items) in enumerate(
        zip(*joined(made().val_dataloader()).values(), strict=True)
    ):
        if row == 7:
            assert (input_ids == 0).all()
            assert (labels == -100).all()
            assert not distance.any()
            assert not items.any()
            continue
        sample = TASK.sample(0, "val", row, 20)
        assert (input_ids.tolist(), labels.tolist()) == (sample.input_ids.tolist(), sample.labels.tolist())
        assert (distance.tolist(), items.tolist()) == (sample.distance.tolist(), [3] * 20)
    batch = next(iter(made().train_dataloader()))
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {name: (torch.int64, (4, 20)) for name in NAMES}


def test_splits_are_different_samples_and_prediction_is_of_the_test_samples() -> None:
    data = made(train_samples=8, val_samples=8, test_samples=8)
    splits = [joined(loader()) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    rows = torch.cat([split["input_ids"] for split in splits])
    assert len(rows) == len(torch.unique(rows, dim=0)) == 24
    assert_same(joined(data.predict_dataloader()), splits[2])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    for loader in ("train_dataloader", "val_dataloader"):
        alone, helped = (joined(getattr(made(num_workers=count), loader)()) for count in (0, workers))
        assert_same(alone, helped)


def test_ranks_and_batches_change_nothing() -> None:
    whole, data = joined(made(val_samples=8).val_dataloader()), made().dataset("val")
    ranks = [list(EvalSampler(8, micro_batch=2, rank=rank, world_size=2)) for rank in (0, 1)]
    parts = [data[samples] for pair in zip(*ranks, strict=True) for samples in pair]
    assert_same(whole, joined({name: torch.as_tensor(x) for name, x in part.items()} for part in parts))
    order = {"global_batch": 8, "seed": 0}
    one = list(TrainSampler(22, micro_batch=8, **order))
    two = [list(TrainSampler(22, micro_batch=4, rank=rank, world_size=2, **order)) for rank in (0, 1)]
    train = made().dataset("train")
    for step, samples in enumerate(one):
        both = [train[ranks[step]]["input_ids"] for ranks in two]
        np.testing.assert_array_equal(train[samples]["input_ids"], np.concatenate(both))


def test_every_epoch_has_every_sample_in_another_order() -> None:
    orders = [np.concatenate(list(made().train_sampler(epoch))) for epoch in (0, 1)]
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist()) == [-1, -1, *range(22)]
    assert orders[0].tolist() != orders[1].tolist()


def test_the_seed_decides_the_samples() -> None:
    one, other = (set(map(tuple, joined(made(seed=seed).val_dataloader())["input_ids"].tolist())) for seed in (0, 1))
    assert len(one & other) == 1, "only the padding"


def test_it_tells_what_a_model_needs() -> None:
    assert (made().vocab_size, made().eos_id) == (32, 0)
    assert (made(task=Copying(num_symbols=5)).vocab_size, made(task=Copying(num_symbols=5)).eos_id) == (7, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 10}, r"Recall\(.*\) does not fit into seq_len=10: it needs at least 11"),
        ({"task": Needles(), "seq_len": 100}, r"Needles\(.*\) does not fit into seq_len=100: it needs at least 154"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"train_samples": 0}, "train_samples=0 must be at least 1"),
        ({"val_samples": 0}, "val_samples=0 must be at least 1"),
        ({"test_samples": 0}, "test_samples=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options).setup("fit")


class Recorder(LightningModule):
    """Keeps the inputs that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(max_steps: int, data: SyntheticDataModule, folder: Path, ckpt_path: Path | None = None) -> list[torch.Tensor]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=max_steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "some.ckpt")
    return module.seen


@pytest.mark.parametrize(("stop", "workers"), [(3, 0), (6, 0), (8, 1)])
def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path, stop: int, workers: int) -> None:
    unbroken = fit(10, made(), tmp_path)  # six batches an epoch
    fit(stop, made(), tmp_path)
    resumed = fit(10, made(num_workers=workers), tmp_path, tmp_path / "some.ckpt")
    assert len(resumed) == 10 - stop
    for mine, theirs in zip(resumed, unbroken[stop:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": Recall(vocab_size=32, num_pairs=4)}, r"trained with task=Recall\(.*num_pairs=3.*num_pairs=4"),
        ({"seq_len": 21}, "trained with seq_len=20, this run has 21"),
        ({"seed": 1}, "trained with seed=0, this run has 1"),
    ],
)
def test_a_run_of_another_task_is_not_resumed(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    fit(1, made(), tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(2, made(**options), tmp_path, tmp_path / "some.ckpt")
