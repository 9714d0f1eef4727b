"""A model goes from training to transformers, to the released form's place, and back into training, bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer
from rat import CausalLM, ModelConfig
from rat.interop.released import NAMES
from rat_cli.model_forms import is_model

Cli = Callable[..., Any]


@pytest.fixture
def last(cli: Cli, tiny: Path, tmp_path: Path) -> Path:
    assert cli("fit", "--config", tiny).code == 0
    return tmp_path / "run" / "tiny" / "checkpoints" / "last.ckpt"


@pytest.fixture
def model() -> CausalLM:
    """Of 300 token ids, with gates that differ and weights in bf16."""
    torch.manual_seed(0)
    fields = {"chunk_size": 4, "window_size": 3, "pattern": ["rat", "sliding_window"]}
    return CausalLM(ModelConfig(vocab_size=300, d_model=16, num_layers=2, num_heads=4, **fields)).bfloat16()


@pytest.fixture
def convert(cli: Cli, tmp_path: Path) -> Callable[..., Path]:
    """Turn something into a new file or folder of this name."""

    def run(source: Path, to: str, name: str, *more: str | Path) -> Path:
        result = cli("convert", "--checkpoint", source, "--output", tmp_path / name, "--to", to, *more)
        assert result.code == 0, result.err
        return tmp_path / name

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return CausalLM.from_pretrained(path).state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["file", "shards"])
def test_a_checkpoint_becomes_a_model_of_transformers_and_back(
    last: Path, convert: Callable[..., Path], form: str
) -> None:
    source = last if form == "file" else convert(last, "shards", "shards.ckpt")
    expected = weights(last.parents[1] / "model")
    theirs = convert(source, "huggingface", "theirs")
    assert_equal(AutoModelForCausalLM.from_pretrained(theirs).model.state_dict(), expected)
    assert_equal(weights(theirs), expected)
    ours = convert(theirs, "model", "ours")
    assert sorted(file.name for file in ours.iterdir()) == ["config.json", "model.safetensors"]
    assert (ours / "model.safetensors").read_bytes() == (last.parents[1] / "model/model.safetensors").read_bytes()
    back = torch.load(convert(theirs, "file", "back.ckpt"), weights_only=True)
    content = torch.load(last, weights_only=True)
    assert_equal(back["state_dict"], content["state_dict"])
    assert back["model_config"] == content["model_config"]
    assert_equal(weights(convert(ours.parent / "back.ckpt", "huggingface", "again")), expected)


def test_training_starts_from_a_model_as_from_a_checkpoint(
    cli: Cli, tiny: Path, last: Path, convert: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = convert(last, "huggingface", "theirs")
    start = convert(theirs, "file", "start.ckpt")
    shown = [cli("validate", "--config", tiny, "--ckpt_path", path).out for path in (last, start)]
    assert "val/loss" in shown[0]
    assert shown[0].replace(str(last), "") == shown[1].replace(str(start), "")
    fits = {"started": ("--ckpt_path", start), "from": ("--model.init_from", theirs)}
    for name, option in fits.items():
        result = cli("fit", "--config", tiny, "--trainer.logger.init_args.version", name, *option)
        assert result.code == 0, result.err
    started, given = (weights(tmp_path / "run" / name / "model") for name in fits)
    assert_equal(started, given)
    assert any(not torch.equal(x, started[name]) for name, x in weights(theirs).items())


def test_a_model_of_the_hub_is_converted_with_its_tokenizer(
    model: CausalLM, convert: Callable[..., Path], hub: Path
) -> None:
    model.save_pretrained(hub)
    train_tokenizer(["the cat sat on the mat"] * 4, 280).save(str(hub / "tokenizer.json"))
    found = convert(Path("some/model"), "model", "ours")
    assert_equal(weights(found), model.state_dict())
    assert (found / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("told", [True, False])
def test_a_released_file_becomes_everything(
    model: CausalLM, convert: Callable[..., Path], tmp_path: Path, told: bool
) -> None:
    names = {ours.format(n=n): theirs.format(n=n) for theirs, ours in NAMES.items() for n in range(2)}
    cells = {"seq_cell_a": {"d_head": 4, "chunk_size": 4}, "seq_cell_b": {"d_head": 4, "window_size": 3}}
    released = tmp_path / "step.pth"
    torch.save(
        {"task": {names[n]: x for n, x in model.state_dict().items()}, "config": cells if told else {}}, released
    )
    untold = ("--architecture", '{"num_heads": 4, "chunk_size": 4, "window_size": 3}')
    more = () if told else untold
    for to, name in (("model", "ours"), ("huggingface", "theirs")):
        assert_equal(weights(convert(released, to, name, *more)), model.state_dict())
    content = torch.load(convert(released, "file", "start.ckpt", *more), weights_only=True)
    assert_equal(content["state_dict"], {f"model.{name}": x.float() for name, x in model.state_dict().items()})


def test_the_tokenizer_of_the_model_travels(model: CausalLM, convert: Callable[..., Path], tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    train_tokenizer(["the cat sat on the mat"] * 4, 280).save(str(folder / "tokenizer.json"))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(convert(folder, "huggingface", "theirs"))
    for text in ("the cat", f" the\n\n mat{END_OF_TEXT} a ünïcode \U0001f408 cat "):
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == end_of_text_id(ours)
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_a_model(tmp_path: Path, model: CausalLM) -> None:
    assert is_model(model.save_pretrained(tmp_path / "model"))
    assert not is_model(tmp_path)
    assert not is_model(tmp_path / "none.ckpt")
    (tmp_path / "released.pth").touch()
    assert is_model(tmp_path / "released.pth")


def test_a_name_that_the_hub_does_not_know_is_one_line(cli: Cli, hub: Path, tmp_path: Path) -> None:
    result = cli("convert", "--checkpoint", "some/model/none.pth", "--output", tmp_path / "out", "--to", "model")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: no model at some/model/none.pth: there is no such folder")
