"""A wrong YAML is one message that names the file, the key and what was meant, before any time is spent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rat_cli.lightning import RatCLI

Cli = Callable[..., Any]
Write = Callable[..., Path]

CALLBACK = "trainer: {callbacks: [{class_path: lightning_modules.%s, init_args: {%s}}]}"
MISTAKES = {
    "trainr: {max_steps: 1}": "unknown key trainr, did you mean trainer?",
    "optimizer: {lr: 3}": "unknown key optimizer; choose one of ckpt_path, config, data, guard, model",
    "trainer: {max_step: 1}": "unknown key trainer.max_step, did you mean max_steps?",
    "model: {modle: 1}": "unknown key model.modle, did you mean model?",
    "model: {model: {d_modl: 3}}": "unknown key model.model.d_modl, did you mean d_model?",
    "model: {optimizer: {peak: 3}}": "unknown key model.optimizer.peak, did you mean peak_lr?",
    "data: {init_args: {seqlen: 3}}":
        "unknown key data.init_args.seqlen of datamodules.tokens.TokenDataModule, did you mean seq_len?",
    "data: {init_arg: {seq_len: 3}}": "unknown key data.init_arg, did you mean init_args?",
    "data: {batch_size: 3}": "unknown key data.batch_size; choose one of class_path, dict_kwargs, init_args",
    "trainer: {logger: {init_args: {save_dirr: x}}}":
        "unknown key trainer.logger.init_args.save_dirr of lightning.pytorch.loggers.TensorBoardLogger,"
        " did you mean save_dir?",
    CALLBACK % ("LastCheckpoint", "every_n: 3"):
        "unknown key trainer.callbacks[0].init_args.every_n of lightning_modules.LastCheckpoint;"
        " choose one of dirpath, every_n_train_steps",
    CALLBACK % ("LastCheckpont", "dirpath: x"):
        "trainer.callbacks[0].class_path: lightning_modules has no class LastCheckpont, did you mean LastCheckpoint?",
    "trainer: {callbacks: [{class_path: lightning_module.LastCheckpoint}]}":
        "trainer.callbacks[0].class_path: there is no module lightning_module",
    "trainer: {callbacks+: [{class_path: lightning_modules.LastCheckpoint, init_args: {every_n: 3}}]}":
        "unknown key trainer.callbacks[0].init_args.every_n",
    "trainer: {strategy: {class_path: lightning.pytorch.strategies.FSDPStrategy, init_args: {auto_wrap: [x]}}}":
        "unknown key trainer.strategy.init_args.auto_wrap of lightning.pytorch.strategies.FSDPStrategy, did you mean",
    "data: {class_path: datamodules.tokens.TokenDataModul}": "did you mean TokenDataModule?",
    "data: {class_path: lightning_modules.LanguageModel}": "does not correspond to a subclass of LightningDataModule",
    "base: none.yaml": "none.yaml does not exist",
    "base: extra.yaml": "extra.yaml builds on itself",
    "base: 3": "base must be a file or a list of files, not 3",
    "base: [1]": "base must be a file or a list of files, not [1]",
    "- a": "must hold keys and values, not ['a']",
    "a: [": "is no valid YAML",
    "trainer: {max_steps: 1, max_steps: 2}": "is no valid YAML: max_steps stands twice",
    "model: 3": "model must hold keys and values, not 3",
    "trainer: null": "trainer must hold keys and values, not None",
    "model: {model: {d_model: wide}}":
        'Parser key "model.model.d_model":\n  Expected a <class \'int\'>. Got value: wide',
    "trainer: {max_steps: many}": 'Parser key "trainer.max_steps"',
    "model: {model: {pattern: [ratt]}}": "Expected a typing.Literal['rat', 'attention', 'sliding_window', 'rnn']",
    "model: {optimizer: {betas: [0.9]}}": 'Parser key "model.optimizer.betas"',
    "model: {kernel_backend: fast}": "Expected a typing.Literal['auto', 'reference', 'portable', 'native', 'flex'",
    "data: {init_args: {batch_size: big}}": "batch_size",
}  # fmt: skip


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model, data or Trainer may be made."""
    monkeypatch.setattr(RatCLI, "instantiate_classes", lambda self: pytest.fail("it was taken for a good config"))


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_names_file_and_key_and_fix_before_anything_starts(
    cli: Cli, write: Write, tiny: Path, text: str
) -> None:
    path = write(text)
    result = cli("fit", "--config", tiny, "--config", path)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert str(path) in result.err.splitlines()[0]
    assert MISTAKES[text] in result.err
    assert "Traceback" not in result.err
    assert not result.out


@pytest.mark.usefixtures("nothing_starts")
def test_a_mistake_in_a_base_names_the_base(cli: Cli, write: Write, tiny: Path) -> None:
    base = write("trainer: {max_step: 1}", "folder/base.yaml")
    result = cli("fit", "--config", tiny, "--config", write("base: folder/base.yaml"))
    assert result.code == 2
    assert f"{base}: unknown key trainer.max_step" in result.err


@pytest.mark.usefixtures("nothing_starts")
def test_a_circle_of_bases_is_refused(cli: Cli, write: Write) -> None:
    write("base: b.yaml", "a.yaml")
    write("base: c.yaml", "b.yaml")
    result = cli("fit", "--config", write("base: a.yaml", "c.yaml"))
    assert result.code == 2
    assert "c.yaml builds on itself" in result.err


@pytest.mark.usefixtures("nothing_starts")
def test_a_missing_file_is_named(cli: Cli, tmp_path: Path) -> None:
    result = cli("fit", "--config", tmp_path / "none.yaml")
    assert (result.code, "none.yaml: No such file" in result.err) == (2, True)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.model.d_modl=3", "did you mean --model.model.d_model?"),
        ("--confg=x", "did you mean --config?"),
        ("extra", "unrecognized arguments: extra"),
        ("--model.optimizer.peak_lr=x", 'Parser key "model.optimizer.peak_lr"'),
    ],
)
def test_a_mistake_on_the_command_line_is_named(cli: Cli, tiny: Path, argument: str, message: str) -> None:
    result = cli("fit", "--config", tiny, argument)
    assert (result.code, message in result.err) == (2, True), result.err


def printed(cli: Cli, *arguments: object) -> dict[str, Any]:
    result = cli("fit", *arguments, "--print_config")
    assert result.code == 0, result.err
    return yaml.safe_load(result.out)


def test_later_files_win_and_the_command_line_over_all(cli: Cli, write: Write, tiny: Path) -> None:
    first = write("trainer: {max_steps: 7, log_every_n_steps: 3}", "first.yaml")
    second = write("trainer: {max_steps: 8}\ndata: {init_args: {seed: 5}}", "second.yaml")
    layered = ["--config", tiny, "--config", first, "--config", second]
    config = printed(cli, *layered, "--model.model.d_model", "32")
    assert (config["trainer"]["max_steps"], config["trainer"]["log_every_n_steps"]) == (8, 3)
    assert config["data"]["init_args"] | {"seed": 5, "batch_size": 2} == config["data"]["init_args"]
    assert (config["model"]["model"]["d_model"], config["model"]["model"]["chunk_size"]) == (32, 4)


def test_a_file_wins_over_its_bases_and_they_over_theirs(cli: Cli, write: Write, tiny: Path) -> None:
    write("trainer: {max_steps: 3, max_epochs: 3, log_every_n_steps: 3}", "far/far.yaml")
    write("base: far/far.yaml\ntrainer: {max_steps: 4, max_epochs: 4}", "near.yaml")
    write("trainer: {max_time: '00:01:00:00'}", "other.yaml")
    path = write("base: [near.yaml, other.yaml]\ntrainer: {max_steps: 5}", "file.yaml")
    trainer = printed(cli, "--config", tiny, "--config", path)["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["log_every_n_steps"]) == (5, 4, 3)
    assert trainer["max_time"] == "00:01:00:00"


def test_what_print_config_prints_is_a_config_that_says_the_same(cli: Cli, write: Write, tiny: Path) -> None:
    config = printed(cli, "--config", tiny)
    assert printed(cli, "--config", write(yaml.safe_dump(config), "printed.yaml")) == config


def test_a_file_read_before_does_not_show_in_a_later_message(cli: Cli, write: Write, tiny: Path) -> None:
    cli("fit", "--config", tiny, "--config", write("model: {model: {d_model: wide}}"))
    result = cli("fit", "--config", tiny, "--model.model.d_model", "wide")
    assert result.code == 2
    assert "extra.yaml" not in result.err
