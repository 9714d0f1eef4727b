"""The command line in this process, and a config that trains in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from rat_cli.main import main

TINY = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}, name: run, version: tiny}}
  callbacks:
    - class_path: lightning_modules.LastCheckpoint
      init_args: {{every_n_train_steps: 1}}
    - class_path: lightning_modules.ExportModel
model:
  model: {{vocab_size: 64, d_model: 16, num_layers: 2, num_heads: 2, chunk_size: 4, max_seq_len: 16}}
  global_batch_size: 4
  val_every_n_steps: 1
data:
  class_path: datamodules.tokens.TokenDataModule
  init_args: {{path: {data}, seq_len: 16, batch_size: 2}}
"""


class Result(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `cli.py` with these arguments; an exception that main does not turn into a message fails the test."""

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file with this text."""

    def make(text: str, name: str = "extra.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


@pytest.fixture
def tiny(write: Callable[..., Path], random_shards: Path, tmp_path: Path) -> Path:
    """A whole config for fit on random shards; its run is run/tiny in tmp_path."""
    return write(TINY.format(folder=tmp_path, data=random_shards), "tiny.yaml")
