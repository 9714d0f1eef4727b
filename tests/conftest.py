"""What several folders of tests share: shards to train on, and Triton kernels that run without a GPU."""

import os
from pathlib import Path

# Workers that share the cores would wait for each other's threads; read where PyTorch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

# Read where the kernels are defined, so before anything of `rat` is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from datamodules.shards import ShardWriter

VOCAB_SIZE, EOS = 64, 63


@pytest.fixture(scope="session")
def random_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: train/ and val/ of random tokens below 64, with ends of text, 3 bytes a token."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 4000), ("val", 500)):
        with ShardWriter(folder / split, vocab_size=VOCAB_SIZE, eos_id=EOS) as writer:
            writer.write(draw.integers(VOCAB_SIZE, size=count), num_bytes=3 * count, num_chars=3 * count)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Another corpus for tests/datamodules/test_roundtrip.py."""
    parser.addoption("--prose", type=Path, help="folder of .txt files for tests/datamodules/test_roundtrip.py")
