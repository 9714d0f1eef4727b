"""The command line in this process, and a config that trains in a second."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer

from datamodules.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rat import CausalLM, ModelConfig
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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of save_pretrained with its tokenizer; weights so large that every token leaves its trace."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300, d_model=16, num_layers=2, num_heads=2, chunk_size=4, max_seq_len=32, init_std=0.4
    )
    CausalLM(config).save_pretrained(tmp_path / "model")
    train_tokenizer(["some words and more words of some text ä"] * 9, 280).save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece tokenizer that falls back on bytes and puts a space before every text."""
    folder, model = tmp_path_factory.mktemp("llama"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words and more words"] * 20), model_writer=model, vocab_size=280,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    save_tokenizer(folder / "tokenizer.model", folder / "tokenizer.json")
    return load_tokenizer(folder)
