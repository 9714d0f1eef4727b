"""Synthetic shards in which every token tells where it stands."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import ShardWriter

EOS = 60_000


@pytest.fixture
def counting(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with train/ and val/ whose token i is i, so that a sample's first token names it."""

    def make(train_tokens: int, val_tokens: int = 0, shard_tokens: int = 37, name: str = "counting") -> Path:
        for split, count in (("train", train_tokens), ("val", val_tokens)):
            if count:
                with ShardWriter(
                    tmp_path / name / split, vocab_size=EOS + 1, eos_id=EOS, shard_tokens=shard_tokens
                ) as writer:
                    writer.write(np.arange(count), num_bytes=3 * count, num_chars=2 * count)
        return tmp_path / name

    return make
