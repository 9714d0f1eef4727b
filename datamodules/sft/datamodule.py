"""The LightningDataModule for fine-tuning: the loss is on answers only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from datamodules.dataset import IGNORED, Batch
from datamodules.resumable import SplitDataModule, check_at_least
from datamodules.sampler import PADDING
from datamodules.sft.examples import Examples
from datamodules.sft.packing import pack, padding
from datamodules.sft.prompts import PromptDataset
from datamodules.tokenizer import FILE_NAME


class SFTDataset(Dataset[Batch]):
    """Rows of T tokens: an example each, padded on the right, or as many as fit.

    It is indexed by a whole micro batch of row numbers (B,) and gives the batch: `input_ids` (B, T) int64; `labels`
    (B, T) int64, the next token where that belongs to an answer (its end of text included), else -100; and with
    packing `document_ids` (B, T) int64, by which examples are kept apart. Padding is end-of-text tokens; the row
    PADDING holds nothing else.

    Args:
        examples: prompts and answers, none longer than a row.
        seq_len: T.
        chunk_size: pack, and let every example begin at a multiple of it; None gives each a row of its own.
    """

    def __init__(self, examples: Examples, seq_len: int, chunk_size: int | None = None) -> None:
        self.examples, self.seq_len, self.chunk_size = examples, seq_len, chunk_size
        lengths = examples.lengths.sum(axis=1)
        self.rows = [[i] for i in range(len(lengths))] if chunk_size is None else pack(lengths, seq_len, chunk_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, samples: NDArray[np.int64]) -> Batch:
        """The batch of the rows numbered `samples` (B,)."""
        shape = len(samples), self.seq_len
        batch = {"input_ids": torch.full(shape, self.examples.eos_id), "labels": torch.full(shape, IGNORED)}
        if self.chunk_size is not None:
            batch["document_ids"] = torch.zeros(shape, dtype=torch.int64)
        for i, sample in enumerate(samples):
            if sample != PADDING:
                self._fill({name: rows[i] for name, rows in batch.items()}, self.rows[sample])
        return batch

    def _fill(self, row: Batch, documents: list[int]) -> None:
        start = 0
        for number, document in enumerate(documents):
            prompt, answer = (torch.from_numpy(part.astype(np.int64)) for part in self.examples[document])
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            row["input_ids"][start:middle] = prompt
            row["input_ids"][middle:end] = answer
            row["labels"][middle - 1 : end - 1] = answer
            if self.chunk_size is not None:
                row["document_ids"][start:] = number
                start = -(-end // self.chunk_size) * self.chunk_size


class SFTDataModule(SplitDataModule):
    """Batches of prompts and answers, see `SFTDataset`, with exact resume in the middle of an epoch.

    Packed rows give every example the loss that it has in a row of its own. But an optimiser step counts rows: with
    packing it trains on more examples, and an epoch has fewer steps.

    Args:
        path: folder made by `python cli.py prepare sft`, holding `train/`, `val/` and `test/`.
        seq_len: tokens of a row, T; at least that of `prepare sft`.
        packing: put as many examples into a row as fit, masked from each other.
        chunk_size: with packing, examples begin at multiples of it. The model's (or a multiple), so that none of its
            chunks holds two examples; divides seq_len.
        batch_size, global_batch_size, seed, num_workers, shuffle: see `ResumableDataModule`.
        verify_checksums: read all shards once before the start, and compare them with their checksums.
        max_new_tokens: most tokens of an answer that `predict` writes. Default: that of `prepare sft`.

    Raises:
        ValueError: arguments that do not fit each other, the data, the Trainer, or the checkpoint.
        ShardError: data missing, damaged or foreign (a ValueError too).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seq_len: int = 4096,
        packing: bool = False,
        chunk_size: int = 16,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        shuffle: bool = True,
        verify_checksums: bool = False,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
            shuffle=shuffle,
        )
        check_at_least(1, seq_len=seq_len, chunk_size=chunk_size, max_new_tokens=max_new_tokens)
        self.path, self.seq_len = Path(path), seq_len
        self.packing, self.chunk_size = packing, chunk_size if packing else None
        self.verify_checksums, self.max_new_tokens = verify_checksums, max_new_tokens
        self._datasets: dict[str, SFTDataset | PromptDataset] = {}

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self._any.examples.shards.index.vocab_size or 0

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json that the prompts and answers are in."""
        return self.path / FILE_NAME

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self._any.examples.eos_id

    @property
    def _any(self) -> SFTDataset | PromptDataset:
        """A split that is open already, or the training data."""
        return next(iter(self._datasets.values()), None) or self.dataset("train")

    def dataset(self, split: str) -> SFTDataset | PromptDataset:
        """The rows of `split` ("train", "val" or "test"), or the prompts of "predict", opened on first use."""
        if split not in self._datasets:
            others = [opened.examples.shards.index.tokenizer_sha256 for opened in self._datasets.values()]
            examples = Examples(self.path / ("test" if split == "predict" else split), others[0] if others else None)
            if split == "predict":
                self._datasets[split] = PromptDataset(examples, self.max_new_tokens)
                return self._datasets[split]
            longest = examples.lengths.sum(axis=1).max()
            if longest > self.seq_len:
                raise ValueError(
                    f"seq_len={self.seq_len} is too short for {self.path / split}, where an example has {longest}"
                    f" tokens: set seq_len to the one it was prepared with, or prepare sft --seq_len {self.seq_len}"
                )
            self._datasets[split] = SFTDataset(examples, self.seq_len, self.chunk_size)
        return self._datasets[split]

    def prepare_data(self) -> None:
        """Compare the shards with their checksums, if asked to, once on every node."""
        for split in ("train", "val", "test") if self.verify_checksums else ():
            Examples(self.path / split).shards.verify()

    def setup(self, stage: str) -> None:
        """Open the splits that `stage` needs; say what packing saves."""
        super().setup(stage)
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for split in splits[stage]:
            self.dataset(split)
        if stage == "fit" and self.chunk_size is not None:
            lengths = self.dataset("train").examples.lengths.sum(axis=1)
            rank_zero_info(str(padding(lengths, self.seq_len, self.chunk_size)))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts of the test examples, once over all ranks, in order; see `PromptDataset`."""
        return self._loader("predict", self.eval_sampler("predict"))

    def identity(self) -> dict[str, int | str]:
        """See `ResumableDataModule.identity`."""
        tokenizer = self.dataset("train").examples.shards.index.tokenizer_sha256
        own = {"seq_len": self.seq_len, "packing": self.chunk_size or 0}
        return own | ({"tokenizer_sha256": tokenizer} if tokenizer else {})
