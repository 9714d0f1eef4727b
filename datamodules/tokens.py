"""The LightningDataModule for language modelling on shards of tokens."""

from pathlib import Path
from typing import Any

from datamodules.dataset import TokenDataset, TokenLoader
from datamodules.resumable import ResumableDataModule, check_at_least
from datamodules.shards import TokenShards
from datamodules.tokenizer import FILE_NAME

_RELEASED_EOS = 2


class TokenDataModule(ResumableDataModule):
    """Batches of next-token prediction from prepared shards, with exact resume in the middle of an epoch.

    A batch is a dict of int64 tensors (B, T), see `datamodules.dataset.make_batch`; order and resume are those of
    `ResumableDataModule`.

    Args:
        path: folder made by `python cli.py prepare pretrain`, holding `train/` and `val/`.
        train_path: training shards: a folder, or one file (raw uint16 too). Instead of path/train.
        val_path: validation shards. Instead of path/val.
        seq_len: tokens of a sample, T.
        max_tokens: train on the first so many tokens of the shards only.
        batch_size, global_batch_size, seed, num_workers, shuffle: see `ResumableDataModule`.
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
        max_tokens: int | None = None,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        shuffle: bool = True,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        mask_documents: bool = False,
        verify_checksums: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
            shuffle=shuffle,
        )
        check_at_least(1, seq_len=seq_len, max_tokens=max_tokens)
        if path is None and train_path is None and val_path is None:
            raise ValueError("no data: give path (a prepared folder), or train_path and val_path")
        folder = None if path is None else Path(path)
        self._paths = {
            "train": Path(train_path) if train_path else folder and folder / "train",
            "val": Path(val_path) if val_path else folder and folder / "val",
        }
        self.seq_len, self.max_tokens, self.mask_documents = seq_len, max_tokens, mask_documents
        self.verify_checksums = verify_checksums
        self._eos_id, self._vocab_size = eos_id, vocab_size
        self._datasets: dict[str, TokenDataset] = {}

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary of the training shards, or of the validation shards if there are only those."""
        index = self.dataset("train" if self._paths["train"] else "val").shards.index
        if index.vocab_size is None and self._vocab_size is None:
            raise ValueError("raw shards do not say their vocabulary: give vocab_size")
        return self._vocab_size or index.vocab_size or 0

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json beside the shards, if there is one."""
        folder = next(path for path in self._paths.values() if path).parent
        return folder / FILE_NAME if (folder / FILE_NAME).is_file() else None

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

    @property
    def checksums(self) -> dict[str, str | None]:
        """Of what has been opened: `TokenShards.checksum` by split."""
        return {split: opened.shards.checksum for split, opened in self._datasets.items()}

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
            limit = self.max_tokens if split == "train" else None
            self._datasets[split] = TokenDataset(shards, self.seq_len, eos_id, limit)
        return self._datasets[split]

    def prepare_data(self) -> None:
        """Compare the shards with their checksums, if asked to, once on every node."""
        for path in self._paths.values() if self.verify_checksums else ():
            if path is not None:
                TokenShards(path).verify()

    def setup(self, stage: str) -> None:
        """Open the shards that `stage` needs."""
        super().setup(stage)
        if stage == "fit":
            self.dataset("train")
        if stage != "fit" or self._paths["val"]:
            self.dataset("val")

    def train_dataloader(self) -> TokenLoader:
        """Micro batches for this rank, from where the Trainer (or its checkpoint) stands."""
        return TokenLoader(self.dataset("train"), self.resumed_sampler(), self.num_workers, self.mask_documents)

    def val_dataloader(self) -> TokenLoader | list[Any]:
        """Every validation sample once over all ranks, in order; nothing if there are no validation shards."""
        if self._paths["val"] is None:
            return []
        return TokenLoader(self.dataset("val"), self.eval_sampler("val"), self.num_workers, self.mask_documents)

    def test_dataloader(self) -> TokenLoader | list[Any]:
        """The validation samples again: what is prepared for pre-training has no third split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> TokenLoader | list[Any]:
        """The validation samples, whose losses `predict` tells one by one."""
        return self.val_dataloader()

    def identity(self) -> dict[str, int | str]:
        """See `ResumableDataModule.identity`."""
        tokenizer = self.dataset("train").shards.index.tokenizer_sha256
        return {"seq_len": self.seq_len} | ({"tokenizer_sha256": tokenizer} if tokenizer else {})
