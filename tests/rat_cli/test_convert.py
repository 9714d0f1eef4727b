"""Checkpoints in every form hold the same, and what cannot be turned into another is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.sharded_checkpoints import read_folder
from rat import CausalLM
from rat_cli.convert import read_checkpoint

Cli = Callable[..., Any]


@pytest.fixture
def last(cli: Cli, tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint of training, one file."""
    assert cli("fit", "--config", tiny).code == 0
    return tmp_path / "run" / "tiny" / "checkpoints" / "last.ckpt"


def convert(cli: Cli, checkpoint: Path, output: Path, to: str, *more: str | Path) -> Any:
    return cli("convert", "--checkpoint", checkpoint, "--output", output, "--to", to, *more)


def assert_equal(found: Any, expected: Any) -> None:
    """All the way down; a dict's order does not matter, as torch.distributed.checkpoint keeps none."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_there_and_back_nothing_is_lost(cli: Cli, last: Path, tmp_path: Path) -> None:
    shards, back = tmp_path / "shards.ckpt", tmp_path / "back.ckpt"
    assert convert(cli, last, shards, "shards").code == 0
    assert convert(cli, shards, back, "file").code == 0
    content = torch.load(last, weights_only=True)
    assert content["optimizer_states"][0]["state"][0]["exp_avg"].any()
    assert_equal(torch.load(back, weights_only=True), content)
    assert_equal(read_folder(shards), content)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("through_shards", [False, True])
def test_a_model_is_what_training_exported(cli: Cli, last: Path, tmp_path: Path, through_shards: bool) -> None:
    (tmp_path / "tokenizer.json").write_text("a tokenizer")
    checkpoint = last
    if through_shards:
        checkpoint = tmp_path / "shards.ckpt"
        convert(cli, last, checkpoint, "shards")
    more = () if through_shards else ("--tokenizer", tmp_path / "tokenizer.json")  # beside the shards there is one
    assert convert(cli, checkpoint, tmp_path / "model", "model", *more).code == 0
    found, exported = (CausalLM.from_pretrained(path) for path in (tmp_path / "model", last.parents[1] / "model"))
    assert found.config == exported.config
    assert_equal(found.state_dict(), exported.state_dict())
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "a tokenizer"


def test_shards_are_validated_as_the_file_is(cli: Cli, tiny: Path, last: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards.ckpt"
    convert(cli, last, shards, "shards")
    outputs = [cli("validate", "--config", tiny, "--ckpt_path", path).out for path in (last, shards)]
    assert "val/loss" in outputs[0]
    assert outputs[1].replace(str(shards), str(last)) == outputs[0]


def test_what_is_there_is_not_overwritten(cli: Cli, last: Path, tmp_path: Path) -> None:
    before = last.read_bytes()
    result = convert(cli, last, last, "file")
    assert (result.code, result.err.splitlines()[-1]) == (1, f"error: {last} exists: choose another --output")
    assert last.read_bytes() == before


def break_a_shard(shards: Path) -> None:
    shard = next(shards.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])


DAMAGED, LESS = "is damaged or incomplete: copy it again", "is no whole checkpoint of shards: it holds no"


def test_damaged_shards_are_refused(cli: Cli, last: Path, tmp_path: Path) -> None:
    harms: list[tuple[Callable[[Path], object], str]] = [
        (lambda shards: next(shards.glob("*.distcp")).unlink(), DAMAGED),
        (break_a_shard, DAMAGED),
        (lambda shards: (shards / "meta.pt").write_bytes(b"half"), DAMAGED),
        (lambda shards: (shards / ".metadata").write_bytes(b"half"), DAMAGED),
        (lambda shards: (shards / ".metadata").unlink(), f"{LESS} .metadata"),
        (lambda shards: (shards / "meta.pt").unlink(), f"{LESS} meta.pt"),
    ]
    shards = tmp_path / "shards.ckpt"
    for harm, message in harms:
        convert(cli, last, shards, "shards")
        harm(shards)
        result = convert(cli, shards, tmp_path / "back.ckpt", "file")
        assert result.code == 1, result.err
        assert result.err.splitlines()[-1].startswith(f"error: {shards} {message}")
        assert not (tmp_path / "back.ckpt").exists()
        shutil.rmtree(shards)


def test_other_files_are_refused(cli: Cli, last: Path, tmp_path: Path) -> None:
    def says(checkpoint: Path, to: str = "file", *more: str | Path) -> str:
        result = convert(cli, checkpoint, tmp_path / "out", to, *more)
        assert result.code == 1, result.err
        assert not (tmp_path / "out").exists()
        return result.err.splitlines()[-1]

    assert "not found" in says(tmp_path / "none.ckpt")
    model = last.parents[1] / "model"
    assert convert(cli, model, tmp_path / "start.ckpt", "file").code == 0
    for source in (model, tmp_path / "start.ckpt"):
        assert says(source, "shards") == f"error: {source} has no optimiser to be put into shards: take --to file"
    assert "--architecture is for a released .pth" in says(last, "model", "--architecture.num_heads", "2")
    (tmp_path / "half.ckpt").write_bytes(last.read_bytes()[:1000])
    assert "half.ckpt is damaged or no checkpoint: copy it again" in says(tmp_path / "half.ckpt")
    for name in ("text.ckpt", "text.pth"):
        (tmp_path / name).write_text("Return the\nA list of\n")
        assert f"{name} is damaged or no " in says(tmp_path / name)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "other.ckpt was not written by cli.py fit: it holds no model_config" in says(tmp_path / "other.ckpt")
    assert "there is no tokenizer none.json" in says(last, "model", "--tokenizer", "none.json")
    assert "--tokenizer goes beside a model, and --to is file" in says(last, "file", "--tokenizer", "none.json")
    content = read_checkpoint(last)
    content["state_dict"].pop("model.embedding.weight")
    torch.save(content, tmp_path / "less.ckpt")
    assert "less.ckpt does not fit the model: embedding.weight is missing" in says(tmp_path / "less.ckpt", "shards")
