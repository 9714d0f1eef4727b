"""The LightningDataModule for language modelling on shards of tokens."""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from datamodules.dataset import TokenDataset, TokenLoader
from datamodules.progress import Position, get_position, set_position
from datamodules.sampler import EvalSampler, TrainSampler
from datamodules.shards import TokenShards

_RELEASED_EOS = 2


class TokenDataModule(LightningDataModule):
    """Batches of next-token prediction from prepared shards, with exact resume in the middle of an epoch.

    A batch is a dict of int64 tensors (B, T), see `datamodules.dataset.make_batch`. The Trainer needs
    `use_distributed_sampler=False`, since the order over ranks is this module's own (`datamodules.sampler`).
    A checkpoint holds the number of samples trained on; a run resumed from it goes on with the next one, also
    with other numbers of workers and ranks and another micro batch.

    Args:
        path: folder made by `python cli.py prepare`, holding `train/` and `val/`.
        train_path: training shards: a folder, or one file (raw uint16 too). Instead of path/train.
        val_path: validation shards. Instead of path/val.
        seq_len: tokens of a sample, T.
        batch_size: samples a device takes at once (the micro batch), B.
        global_batch_size: samples of an optimiser step over all devices and accumulated micro batches. If
            given, it is compared with what the Trainer would do; if not, it follows from the Trainer.
        seed: decides the order of the samples.
        num_workers: processes that read ahead; see TokenLoader.
        eos_id: token that ends a document. Default: what the index says, or 2 for raw files.
        vocab_size: for raw files, whose vocabulary nothing tells; otherwise the index knows.
        mask_documents: add `document_ids` to the batch, so that a model keeps documents apart.
        verify_checksums: read all shards once before the start, and compare them with their checksums.

    Raises:
        ValueError: arguments that do not fit each other, the Trainer, or the checkpoint.
        ShardError: shards missing, damaged or foreign (a ValueError too).
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        train_path: str | Path | None = None,
        val_path: str | Path | None = None,
        seq_len: int = 1024,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        mask_documents: bool = False,
        verify_checksums: bool = False,
    ) -> None:
        super().__init__()
        if path is None and train_path is None and val_path is None:
            raise ValueError("no data: give path (a prepared folder), or train_path and val_path")
        positive = {"seq_len": seq_len, "batch_size": batch_size, "global_batch_size": global_batch_size}
        for name, value in {**positive, "num_workers": num_workers, "seed": seed}.items():
            if value is not None and value < (least := int(name in positive)):
                raise ValueError(f"{name}={value} must be at least {least}")
        folder = None if path is None else Path(path)
        self._paths = {
            "train": Path(train_path) if train_path else folder and folder / "train",
            "val": Path(val_path) if val_path else folder and folder / "val",
        }
        self.seq_len, self.batch_size, self.global_batch_size = seq_len, batch_size, global_batch_size
        self.seed, self.num_workers, self.mask_documents = seed, num_workers, mask_documents
        self.verify_checksums = verify_checksums
        self._eos_id, self._vocab_size = eos_id, vocab_size
        self._datasets: dict[str, TokenDataset] = {}
        self._resume: dict[str, int] | None = None

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary of the training shards, or of the validation shards if there are only those."""
        index = self.dataset("train" if self._paths["train"] else "val").shards.index
        if index.vocab_size is None and self._vocab_size is None:
            raise ValueError("raw shards do not say their vocabulary: give vocab_size")
        return self._vocab_size or index.vocab_size or 0

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self.dataset("train" if self._paths["train"] else "val").eos_id

    @property
    def val_bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token of the validation text, which turns nats per token into bits per byte.

        None if the shards do not record it (raw files).
        """
        return self.dataset("val").shards.bytes_per_token

    def dataset(self, split: str) -> TokenDataset:
        """The samples of `split` ("train" or "val"), opened on first use."""
        if split not in self._datasets:
            path = self._paths[split]
            if path is None:
                raise ValueError(f"no {split} data: give path (a prepared folder) or {split}_path")
            others = [opened.shards.index.tokenizer_sha256 for opened in self._datasets.values()]
            shards = TokenShards(path, tokenizer_sha256=others[0] if others else None)
            known = shards.index.vocab_size
            if known is not None and self._vocab_size is not None and self._vocab_size < known:
                raise ValueError(f"vocab_size={self._vocab_size} is smaller than that of {path}, {known}")
            given = self._eos_id if self._eos_id is not None else shards.index.eos_id
            eos_id = _RELEASED_EOS if given is None else given
            self._datasets[split] = TokenDataset(shards, self.seq_len, eos_id)
        return self._datasets[split]

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
            len(self.dataset("train")), micro_batch=self.batch_size, global_batch=wanted,
            rank=world["rank"], world_size=world["num_replicas"], seed=self.seed, epoch=epoch, start=start,
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Compare the shards with their checksums, if asked to, once on every node."""
        for path in self._paths.values() if self.verify_checksums else ():
            if path is not None:
                TokenShards(path).verify()

    def setup(self, stage: str) -> None:
        """Open the shards that `stage` needs; refuse a Trainer that would put its own sampler in the way."""
        trainer = self.trainer
        if trainer and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "the Trainer would replace the sampler that makes runs repeatable: set its"
                " use_distributed_sampler to false"
            )
        # Lightning knows only loaders that keep their own position
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        if stage == "fit":
            if trainer and trainer.overfit_batches:
                raise ValueError("overfit_batches would replace the sampler: use limit_train_batches, or less data")
            self.dataset("train")
        if stage != "fit" or self._paths["val"]:
            self.dataset("val")

    def train_dataloader(self) -> TokenLoader:
        """Shuffled micro batches for this rank, from where the Trainer (or its checkpoint) stands."""
        epoch, start = self._place() if self.trainer else (0, 0)
        sampler = self.train_sampler(epoch, start)
        return TokenLoader(self.dataset("train"), sampler, self.num_workers, self.mask_documents)

    def val_dataloader(self) -> TokenLoader | list[Any]:
        """Every validation sample once over all ranks, in order; nothing if there are no validation shards."""
        if self._paths["val"] is None:
            return []
        world = self._world()
        sampler = EvalSampler(
            len(self.dataset("val")),
            micro_batch=self.batch_size,
            rank=world["rank"],
            world_size=world["num_replicas"],
        )
        return TokenLoader(self.dataset("val"), sampler, self.num_workers, self.mask_documents)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: the data's identity, and the samples trained on (over all ranks)."""
        if self.trainer is None or "train" not in self._datasets:
            return {}
        step, position = self._samples_per_micro_step(), get_position(self.trainer)
        return {
            **self._identity(),
            "epoch": position.epoch,
            "samples_consumed": position.micro_batches * step,
            "samples_in_all_epochs": position.total * step,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember where to go on. Raises ValueError if a resumed `fit` has other data, seq_len or seed."""
        if not state_dict or (self.trainer and self.trainer.state.fn != "fit"):
            return
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"the checkpoint was trained with {name}={state_dict[name]}, this run has {value}: resume with"
                    " the same data, seq_len and seed, or load only its weights into a new run"
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

    def _identity(self) -> dict[str, int]:
        return {"total_samples": len(self.dataset("train")), "seq_len": self.seq_len, "seed": self.seed}

    def _samples_per_micro_step(self) -> int:
        return self.batch_size * self._world()["num_replicas"]

    def _world(self) -> dict[str, int]:
        """The data-parallel ranks: with tensor parallelism fewer than processes."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return kwargs or {"num_replicas": 1, "rank": 0}
