"""A model, data and a Trainer so small that a fit takes a tenth of a second."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rat import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    pattern=["rat", "sliding_window"],
    chunk_size=4,
    max_seq_len=12,
)


class Ragged(LightningDataModule):
    """Six batches of two rows of 12 tokens, in which ever fewer labels count, and none in some rows."""

    vocab_size, batch_size, val_bytes_per_token = CONFIG.vocab_size, 2, 3.0

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.batches = []
        for i in range(6):
            ids = torch.randint(CONFIG.vocab_size, (2, CONFIG.max_seq_len + 1), generator=draw)
            labels = ids[:, 1:].clone()
            labels[:, : 2 * i] = -100
            labels[0, i + 3 :] = -100
            self.batches.append({"input_ids": ids[:, :-1], "labels": labels})
        vars(self).update(attributes)

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def ragged() -> type[Ragged]:
    """Its keyword arguments replace attributes."""
    return Ragged


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A Trainer of three steps on the CPU that logs every one; its keyword arguments are those of Trainer."""

    def make(**options: Any) -> Trainer:
        defaults = {
            "logger": CSVLogger(tmp_path, name="log", version=0), "max_steps": 3, "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False,
        }  # fmt: skip
        return Trainer(
            accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
            **defaults | options,
        )  # fmt: skip

    return make


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[str], list[float]]:
    """What the last finished fit wrote under a name, one value a step."""

    def read(name: str) -> list[float]:
        with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]

    return read
