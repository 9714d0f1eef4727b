"""The LightningDataModule for synthetic tasks."""

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.dataset import IGNORED
from datamodules.resumable import SplitDataModule, check_at_least
from datamodules.sampler import PADDING
from datamodules.synthetic.task import Task


class SyntheticDataset(Dataset[dict[str, NDArray[np.int64]]]):
    """The samples of a split, made when they are asked for.

    It is indexed by a whole micro batch of sample numbers (B,), and gives `input_ids`, `labels`, `distance` and
    `items`, (B, T) int64 each, see `Sample`. A sample number PADDING gives a row of end-of-text tokens, every target of
    which is ignored.

    Args:
        task: makes the samples.
        split: "train", "val" or "test".
        num_samples: how many there are.
        seq_len: T.
        seed: decides them.
    """

    def __init__(self, task: Task, split: str, num_samples: int, seq_len: int, seed: int) -> None:
        self.task, self.split, self.seq_len, self.seed = task, split, seq_len, seed
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, samples: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """The batch of these samples (B,)."""
        shape = len(samples), self.seq_len
        padding = {"input_ids": self.task.eos_id, "labels": IGNORED, "distance": 0, "items": 0}
        batch = {name: np.full(shape, value) for name, value in padding.items()}
        for row, i in enumerate(samples):
            if i != PADDING:
                sample = self.task.sample(self.seed, self.split, int(i), self.seq_len)
                for name, values in sample._asdict().items():
                    batch[name][row] = values
        return batch


class SyntheticDataModule(SplitDataModule):
    """Batches of a synthetic task, with exact resume in the middle of an epoch.

    A batch is a dict of `input_ids` and `labels`, (B, T) int64 each; only the answers count as targets. `distance` and
    `items` (B, T) beside them tell what made each answer hard, see `Sample`. Sample i of a split is a pure function of
    task, seq_len, seed, split and i. Order and resume are those of `ResumableDataModule`.

    Args:
        task: what to learn.
        seq_len: tokens of a sample, T.
        train_samples: samples of an epoch. Every epoch has the same ones: give as many as a run takes, and all of them
            are new.
        val_samples, test_samples: samples to validate on, and to test on or predict.
        batch_size, global_batch_size, seed, num_workers: see `ResumableDataModule`. The seed decides the samples too.

    Raises:
        ValueError: arguments that do not fit each other, the Trainer, or the checkpoint.
    """

    def __init__(
        self,
        task: Task,
        *,
        seq_len: int = 256,
        train_samples: int = 100_000,
        val_samples: int = 1000,
        test_samples: int = 1000,
        batch_size: int = 32,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, global_batch_size=global_batch_size, seed=seed, num_workers=num_workers)
        counts = {"train_samples": train_samples, "val_samples": val_samples, "test_samples": test_samples}
        check_at_least(1, seq_len=seq_len, **counts)
        self.task, self.seq_len = task, seq_len
        self._counts = {name.removesuffix("_samples"): count for name, count in counts.items()}

    def setup(self, stage: str) -> None:
        """Refuse a task that does not fit into seq_len."""
        super().setup(stage)
        self.task.check_seq_len(self.seq_len)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the task."""
        return self.task.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends a sample."""
        return self.task.eos_id

    def dataset(self, split: str) -> SyntheticDataset:
        """The samples of `split`: "train", "val" or "test"."""
        return SyntheticDataset(self.task, split, self._counts[split], self.seq_len, self.seed)

    def identity(self) -> dict[str, int | str]:
        """See `ResumableDataModule.identity`."""
        return {"seq_len": self.seq_len, "task": self.task.identity()}
