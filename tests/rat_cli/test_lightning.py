"""fit, validate, test and predict from the command line, and what goes wrong with their files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from rat import CausalLM
from rat_cli.lightning import RatCLI

Cli = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run" / "tiny"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return CausalLM.from_pretrained(run / "model").state_dict()


def test_fit_writes_checkpoint_config_and_model(cli: Cli, tiny: Path, run: Path) -> None:
    assert cli("fit", "--config", tiny).code == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["model"]["d_model"] == 16
    assert json.loads((run / "model" / "config.json").read_text())["d_model"] == 16


def test_fit_goes_on_from_the_last_checkpoint_to_the_same_weights(
    cli: Cli, tiny: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the same schedule in one go and in two
    assert cli("fit", "--config", tiny, "--trainer.max_steps", "4").code == 0
    whole = weights(run)
    (run / "checkpoints" / "last.ckpt").unlink()
    make = RatCLI._instantiate_trainer

    def interrupted(self: RatCLI, config: dict[str, Any], callbacks: list[Any]) -> Any:
        trainer = make(self, config, callbacks)
        monkeypatch.setattr(trainer.fit_loop.epoch_loop, "max_steps", 2)
        monkeypatch.setattr(type(trainer), "estimated_stepping_batches", 4)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(RatCLI, "_instantiate_trainer", interrupted)
        assert cli("fit", "--config", tiny, "--ckpt_path", "last").code == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert any(not torch.equal(x, whole[name]) for name, x in weights(run).items())
    assert cli("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", "4").code == 0
    for name, x in weights(run).items():
        torch.testing.assert_close(x, whole[name], rtol=0, atol=0, msg=name)


def test_validate_prints_the_metrics(cli: Cli, tiny: Path, run: Path) -> None:
    cli("fit", "--config", tiny)
    result = cli("validate", "--config", tiny, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert result.code == 0
    for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
        assert name in result.out


@pytest.mark.parametrize("command", ["test", "predict"])
def test_test_and_predict_run(cli: Cli, tiny: Path, run: Path, command: str) -> None:
    cli("fit", "--config", tiny)
    result = cli(command, "--config", tiny, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert result.code == 0, result.err
    assert command == "predict" or "test/perplexity" in result.out


def one_line(result: Any, message: str) -> None:
    lines = [line for line in result.err.splitlines() if "error" in line.lower()]
    assert result.code == 1
    assert len(lines) == 1
    assert result.err.splitlines()[-1] == lines[0]
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in result.err + result.out


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("content", [None, b"PK no checkpoint", b""])
def test_a_missing_or_damaged_checkpoint_is_one_line(
    cli: Cli, tiny: Path, tmp_path: Path, command: str, content: bytes | None
) -> None:
    path = tmp_path / "half.ckpt"
    if content is not None:
        path.write_bytes(content)
    result = cli(command, "--config", tiny, "--ckpt_path", path)
    one_line(result, f"{path} is damaged" if content is not None else f"not found: {path}")


def test_a_best_checkpoint_where_none_was_kept_is_one_line(cli: Cli, tiny: Path) -> None:
    one_line(cli("validate", "--config", tiny, "--ckpt_path", "best"), 'ckpt_path="best"')


def test_a_missing_folder_of_data_is_one_line(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    result = cli("fit", "--config", tiny, "--data.init_args.path", tmp_path / "nowhere")
    one_line(result, "nowhere/train does not exist; make it with: python cli.py prepare")


def test_a_truncated_shard_is_one_line(cli: Cli, tiny: Path, random_shards: Path, tmp_path: Path) -> None:
    for path in random_shards.rglob("*"):
        if path.is_file():
            copy = tmp_path / "cut" / path.relative_to(random_shards)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes()[: 100 if path.suffix == ".bin" else None])
    result = cli("fit", "--config", tiny, "--data.init_args.path", tmp_path / "cut")
    one_line(result, "shard-00000.bin has 100 bytes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {model: {d_model: 15}}", "d_model 15 is not divisible by num_heads 2"),
        ("model: {model: {vocab_size: 60}}", "set model.model.vocab_size to 64"),
        ("model: {optimizer: {peak_lr: -1}}", "peak_lr must be above 0, got -1"),
        ("model: {global_batch_size: 3}", "choose global_batch_size 2 or 4"),
        ("model: {init_from: nowhere}", "no model at nowhere"),
        ("data: {init_args: {batch_size: 0}}", "batch_size=0 must be at least 1"),
        ("trainer: {strategy: ddpp}", "invalid strategy name"),
        ("trainer: {max_steps: -1, max_epochs: -1}", "set trainer.max_steps or trainer.max_epochs"),
        (
            "trainer: {callbacks: [{class_path: lightning_modules.ExportModel, init_args: {tokenizer: none.json}}]}",
            "the tokenizer none.json does not exist",
        ),
    ],
)
def test_values_that_cannot_work_are_one_line(cli: Cli, write: Write, tiny: Path, text: str, message: str) -> None:
    one_line(cli("fit", "--config", tiny, "--config", write(text)), message)


def test_a_checkpoint_of_another_model_is_one_line(cli: Cli, tiny: Path, run: Path) -> None:
    cli("fit", "--config", tiny)
    path = run / "checkpoints" / "last.ckpt"
    result = cli("validate", "--config", tiny, "--ckpt_path", path, "--model.model.d_model", "32")
    one_line(result, "another model than the config: d_model is 16, not 32")


def test_predictions_are_a_line_for_each_sequence(cli: Cli, tiny: Path, run: Path) -> None:
    cli("fit", "--config", tiny)
    result = cli("predict", "--config", tiny, "--ckpt_path", "last")
    assert f"predictions: {run / 'predictions.jsonl'}" in result.out
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 31  # the samples of 16 tokens, not the one of padding behind them
    shown = cli("validate", "--config", tiny, "--ckpt_path", "last").out
    mean = sum(row["nll"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    loss = re.search(r"val/loss[\s│]*([\d.]+)", shown)  # between lines where the package `rich` draws the table
    assert float(loss[1]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar_is_the_same_whatever_is_installed(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    made, make = [], RatCLI._instantiate_trainer
    monkeypatch.setattr(RatCLI, "_instantiate_trainer", lambda *a: made.append(make(*a)) or made[-1])
    assert cli("fit", "--config", tiny, "--trainer.enable_progress_bar", wanted).code == 0
    assert isinstance(made[0].progress_bar_callback, TQDMProgressBar) == wanted


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_no_last_checkpoint_is_one_line(cli: Cli, tiny: Path, command: str) -> None:
    one_line(cli(command, "--config", tiny, "--ckpt_path", "last"), "this run has no checkpoint yet: fit first")
