"""What every LightningDataModule here shares: one order of the samples over all ranks, and exact resume within it."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sized
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.progress import Position, get_position, set_position
from datamodules.sampler import EvalSampler, TrainSampler

# What a checkpoint keeps beside the identity of its data.
_POSITION = ("epoch", "samples_consumed", "samples_in_all_epochs")


class ResumableDataModule(LightningDataModule, ABC):
    """Deals the samples of its datasets out to ranks, and goes on after an interruption with the next one.

    The Trainer needs `use_distributed_sampler=False`, since the order over ranks is this module's own
    (`datamodules.sampler`). A checkpoint holds the number of samples trained on; a run resumed from it goes on with
    the next one, also with other numbers of workers and ranks and another micro batch.

    Args:
        batch_size: samples a device takes at once (the micro batch), B.
        global_batch_size: samples of an optimiser step over all devices and accumulated micro batches. If
            given, it is compared with what the Trainer would do; if not, it follows from the Trainer.
        seed: decides the order of the samples.
        num_workers: processes that read ahead.
        shuffle: whether the training samples come in another order every epoch, or as they stand.

    Raises:
        ValueError: arguments that do not fit each other, the Trainer, or the checkpoint.
    """

    def __init__(
        self, *, batch_size: int, global_batch_size: int | None, seed: int, num_workers: int, shuffle: bool = True
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, global_batch_size=global_batch_size)
        check_at_least(0, seed=seed, num_workers=num_workers)
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self.seed, self.num_workers, self.shuffle = seed, num_workers, shuffle
        self._resume: dict[str, Any] | None = None

    @abstractmethod
    def dataset(self, split: str) -> Sized:
        """The samples of a split: "train", "val" or "test"."""

    @abstractmethod
    def identity(self) -> dict[str, int | str]:
        """What a resumed run must have in common with the one that wrote its checkpoint, by name."""

    def train_sampler(self, epoch: int = 0, start: int = 0) -> TrainSampler:
        """The order of `epoch` for this rank, from the sample `start` on; without a Trainer that of all samples."""
        world = self._world()
        step = self.batch_size * world["num_replicas"]
        follows = step * (self.trainer.accumulate_grad_batches if self.trainer else 1)
        wanted = self.global_batch_size or follows
        if self.trainer and wanted != follows:
            fix = f"set the Trainer's accumulate_grad_batches to {wanted // step}"
            raise ValueError(
                f"global_batch_size={wanted} is not batch_size={self.batch_size} x {world['num_replicas']} devices"
                f" x accumulate_grad_batches={self.trainer.accumulate_grad_batches} = {follows}; "
                + (fix if wanted % step == 0 else "choose a batch_size that divides it")
            )
        return TrainSampler(
            len(self.dataset("train")), micro_batch=self.batch_size, global_batch=wanted, rank=world["rank"],
            world_size=world["num_replicas"], seed=self.seed, epoch=epoch, start=start, shuffle=self.shuffle,
        )  # fmt: skip

    def resumed_sampler(self) -> TrainSampler:
        """`train_sampler` from where the Trainer, or its checkpoint, stands."""
        return self.train_sampler(*self._place()) if self.trainer else self.train_sampler()

    def eval_sampler(self, split: str) -> EvalSampler:
        """Every sample of a split once over all ranks, in order."""
        world = self._world()
        return EvalSampler(
            len(self.dataset(split)),
            micro_batch=self.batch_size,
            rank=world["rank"],
            world_size=world["num_replicas"],
        )

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would put its own sampler in the way."""
        trainer = self.trainer
        if trainer and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "the Trainer would replace the sampler that makes runs repeatable: set its"
                " use_distributed_sampler to false"
            )
        # Lightning knows only loaders that keep their own position
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        warnings.filterwarnings("ignore", message=".*Couldn't infer the batch indices.*")
        if stage == "fit" and trainer and trainer.overfit_batches:
            raise ValueError("overfit_batches would replace the sampler: use limit_train_batches, or less data")

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint keeps: the data's identity, and the samples trained on (over all ranks)."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        step, position = self._samples_per_micro_step(), get_position(self.trainer)
        place = position.epoch, position.micro_batches * step, position.total * step
        return {**self._identity(), **dict(zip(_POSITION, place, strict=True))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where to go on. Raises ValueError if a resumed `fit` has other data, another order or seed."""
        if not state_dict or (self.trainer and self.trainer.state.fn != "fit"):
            return
        own, theirs = self._identity(), {k: value for k, value in state_dict.items() if k not in _POSITION}
        for name in own | theirs:
            if own.get(name) != theirs.get(name):
                raise ValueError(
                    f"the checkpoint was trained with {name}={theirs.get(name, 'unknown')}, this run has"
                    f" {own.get(name, 'unknown')}: resume with the same {', '.join(own | theirs)}, or load only its"
                    " weights into a new run"
                )
        step, consumed = self._samples_per_micro_step(), state_dict["samples_consumed"]
        if consumed % (step * (self.trainer.accumulate_grad_batches if self.trainer else 1)):
            raise ValueError(
                f"the checkpoint was written after {consumed} samples, no whole number of this run's optimiser steps;"
                f" keep the global batch (micro batch {self.batch_size} x devices x accumulation) as it was"
            )
        self._resume = state_dict

    def _place(self) -> tuple[int, int]:
        """The epoch and the sample to go on from; the Trainer's counters are made to agree."""
        assert self.trainer is not None
        step, position, state = self._samples_per_micro_step(), get_position(self.trainer), self._resume
        if state is not None:
            consumed, total = state["samples_consumed"], state["samples_in_all_epochs"]
            position = Position(state["epoch"], consumed // step, total // step)
        if state is not None or position.micro_batches:
            set_position(self.trainer, position)
        self._resume = None
        return position.epoch, position.micro_batches * step

    def _identity(self) -> dict[str, int | str]:
        own = {"total_samples": len(self.dataset("train")), "seed": self.seed, "shuffle": int(self.shuffle)}
        return own | self.identity()

    def _samples_per_micro_step(self) -> int:
        return self.batch_size * self._world()["num_replicas"]

    def _world(self) -> dict[str, int]:
        """The data-parallel ranks: with tensor parallelism fewer than processes."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return kwargs or {"num_replicas": 1, "rank": 0}


class SplitDataModule(ResumableDataModule, ABC):
    """A `ResumableDataModule` with splits "train", "val" and "test", whose datasets give whole batches: indexed by the
    sample numbers (B,) of a micro batch, PADDING among them."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro batches for this rank, from where the Trainer (or its checkpoint) stands."""
        return self._loader("train", self.resumed_sampler())

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample once over all ranks, in order."""
        return self._loader("val", self.eval_sampler("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sample once over all ranks, in order."""
        return self._loader("test", self.eval_sampler("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test samples."""
        return self.test_dataloader()

    def _loader(self, split: str, sampler: TrainSampler | EvalSampler) -> DataLoader[Any]:
        return DataLoader(self.dataset(split), batch_size=None, sampler=sampler, num_workers=self.num_workers)


def check_at_least(least: int, **values: int | None) -> None:
    """Raise a ValueError that names the first argument below `least`; None is no argument."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
