"""Samples of a token sequence as training batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.sampler import PADDING
from datamodules.shards import ShardError, TokenShards

IGNORED = -100
Block = NDArray[Any]
Batch = dict[str, Tensor]


class TokenDataset(Dataset[Block]):
    """Sample i is tokens [i T, i T + T] of the shards: T inputs, and T targets one token further on.

    It is indexed by a whole micro batch of sample numbers (B,), and gives a block (B, T + 1) of tokens in the
    type they have on disk: what `make_batch` makes of it is eight times larger, too much to send between
    processes. A sample number PADDING gives a row of end-of-text tokens, every target of which is ignored.
    Tokens after the last whole sample are left out.

    Args:
        shards: the tokens.
        seq_len: T.
        eos_id: the token that ends a document.
        max_tokens: leave out what comes after so many tokens.

    Raises:
        ShardError: fewer tokens than one sample needs.
    """

    def __init__(self, shards: TokenShards, seq_len: int, eos_id: int, max_tokens: int | None = None) -> None:
        self.shards, self.seq_len, self.eos_id = shards, seq_len, eos_id
        num_tokens = min(shards.num_tokens, max_tokens or shards.num_tokens)
        self._num_samples = (num_tokens - 1) // seq_len
        if self._num_samples < 1:
            raise ShardError(
                f"{shards.path} holds {num_tokens} tokens, fewer than the seq_len + 1 = {seq_len + 1} of a"
                " sample; prepare more text, choose a smaller seq_len or allow more max_tokens"
            )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, samples: NDArray[np.int64]) -> Block:
        """The block (B, T + 1) of tokens of these samples (B,)."""
        block = np.full((len(samples), self.seq_len + 1), self.eos_id, dtype=self.shards.dtype)
        real = samples != PADDING
        if real.all():
            self.shards.read_into(samples * self.seq_len, block)
        else:
            rows = block[real]
            self.shards.read_into(samples[real] * self.seq_len, rows)
            block[real] = rows
        return block


def make_batch(block: Block, eos_id: int, mask_documents: bool = False) -> Batch:
    """What the model is given of a block (B, T + 1).

    Returns:
        `input_ids` (B, T) int64; `labels` (B, T) int64, -100 where the target is ignored because its input is
        an end of text and the target the start of an unrelated document; and with `mask_documents` also
        `document_ids` (B, T) int64, which start at 0 in every row and increase by one after every end of
        text.
    """
    inputs, labels = block[:, :-1].astype(np.int64), block[:, 1:].astype(np.int64)
    ends = inputs == eos_id
    labels[ends] = IGNORED
    batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
    if mask_documents:
        batch["document_ids"] = torch.from_numpy(np.cumsum(ends, axis=1) - ends)
    return batch


class TokenLoader:
    """Batches, see `make_batch`: the sampler picks micro batches, a DataLoader reads them, this process unfolds them.

    It is no DataLoader itself, since Lightning makes those anew, with other samplers, where it predicts.

    Args:
        dataset: where the samples come from.
        sampler: gives micro batches of sample numbers (B,).
        num_workers: processes that read ahead. 0 is fastest from a warm page cache; slow disks need some.
        mask_documents: add `document_ids` to the batches.
    """

    batch_sampler = None  # Lightning asks for it

    def __init__(
        self,
        dataset: TokenDataset,
        sampler: Sampler[NDArray[np.int64]],
        num_workers: int = 0,
        mask_documents: bool = False,
    ) -> None:
        self.dataset, self.sampler, self.mask_documents = dataset, sampler, mask_documents
        self._blocks: DataLoader[Any] = DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=num_workers, collate_fn=_as_it_is,
            prefetch_factor=8 if num_workers else None,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Batch]:
        return (make_batch(block, self.dataset.eos_id, self.mask_documents) for block in self._blocks)


def _as_it_is(block: Block) -> Block:
    return block
