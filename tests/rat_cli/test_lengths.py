"""evaluate lengths: files, table and picture of one model and several, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from datamodules.shards import ShardWriter
from datamodules.tokenizer import fingerprint, train_tokenizer
from rat import CausalLM, ModelConfig

Cli = Callable[..., Any]
VOCAB_SIZE = 64


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A saved model under a name; fields of its config may differ."""

    def make(name: str, **fields: Any) -> Path:
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB_SIZE, "d_model": 16, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
        return CausalLM(ModelConfig(**sizes | {"max_seq_len": 16} | fields)).save_pretrained(tmp_path / name)

    return make


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """Shards of 643 tokens: 0 to 63 over and over."""
    with ShardWriter(tmp_path / "counting" / "val", vocab_size=VOCAB_SIZE, eos_id=63) as writer:
        writer.write([i % VOCAB_SIZE for i in range(643)])
    return tmp_path / "counting"


def test_models_side_by_side(cli: Cli, save: Callable[..., Path], counting: Path, tmp_path: Path) -> None:
    places = {"RoPE": save("rope"), "NoPE": save("nope", rope_base=None, max_seq_len=8)}
    places["RNN"] = save("rnn", pattern=["rnn"])
    named = json.dumps({name: str(place) for name, place in places.items()})
    result = cli("evaluate", "lengths", "--models", named, "--data", counting, "--output", tmp_path / "found")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "found" / "lengths.json").read_text())
    # 1, 2 and 4 times the longer T of training, in the ten windows of 64 that there are
    assert (found["windows"], found["tokens"]) == (10, 640)
    assert list(found["models"]) == ["RoPE", "NoPE", "RNN"]
    table = (tmp_path / "found" / "lengths.md").read_text()
    assert table in result.out
    assert "| model | trained at T | positions | T 16 | T 32 | T 64 |" in table
    for name, place in places.items():
        of = found["models"][name]
        model = CausalLM.from_pretrained(place)
        assert of["config"] == model.config.to_dict()
        tokens = torch.arange(641)
        rows = torch.stack([tokens[i * 64 : i * 64 + 65] for i in range(10)]) % VOCAB_SIZE
        with torch.no_grad():
            second = model(rows[:, :64], labels=rows[:, 1:].where(torch.arange(64) >= 32, -100))
        assert of["lengths"]["64"]["loss"] == pytest.approx(float(second), rel=1e-5)
        assert [of["lengths"]["64"][key] for key in ("first", "last")] == [33, 64]
        assert (of["positions"][0]["first"], of["positions"][-1]["last"]) == (1, 64)
        positions = "RoPE" if name == "RoPE" else "none"
        assert f"| {name} | {model.config.max_seq_len} | {positions} | {of['lengths']['16']['loss']:.3f} ±" in table
    assert (tmp_path / "found" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert not plt.get_fignums()


def test_one_model_and_few_windows(cli: Cli, save: Callable[..., Path], counting: Path, tmp_path: Path) -> None:
    options = ["--lengths", "[640, 20]", "--output", tmp_path, "--per_octave", "1", "--batch_size", "1"]
    result = cli("evaluate", "lengths", "--models", save("one"), "--data", counting / "val", *options)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "lengths.json").read_text())
    assert (found["windows"], list(found["models"]), list(found["models"]["one"]["lengths"])) == (
        1,
        ["one"],
        ["20", "640"],
    )
    assert found["models"]["one"]["lengths"]["20"]["within"] is None
    result = cli(
        "evaluate", "lengths", "--models", tmp_path / "one", "--data", counting, "--windows", "3", *options[2:]
    )
    assert json.loads((tmp_path / "lengths.json").read_text())["windows"] == 3
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--models": "none"}, "no model at none"),
        ({"--models": "{}"}, "there is no model: give --models CHECKPOINT"),
        ({"--data": "none"}, "none does not exist"),
        ({"--lengths": "[700]"}, "holds 643 tokens, fewer than the seq_len + 1 = 701"),
        ({"--lengths": "[1]"}, "lengths must be at least 2 tokens each, got [1]"),
        ({"--lengths": "[]"}, "lengths must be at least 2 tokens each, got []"),
        ({"--windows": "0"}, "windows must be at least 1, got 0"),
        ({"--per_octave": "0"}, "per_octave must be at least 1, got 0"),
        ({"--batch_size": "0"}, "batch_size must be at least 1, got 0"),
        ({"--device": "gpu"}, "there is no device 'gpu' here"),
        ({"--models": "{small}"}, "has 64 token ids, {small} only 60: give the data of its own tokenizer"),
        ({"--models": "{other}"}, "was made with another tokenizer than {other}/tokenizer.json"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, save: Callable[..., Path], tmp_path: Path, options: dict[str, str], message: str
) -> None:
    model, places = save("model"), {"{small}": str(save("small", vocab_size=60)), "{other}": str(tmp_path / "other")}
    shutil.copytree(model, tmp_path / "other")
    for name in ("model", "other"):
        train_tokenizer([f"some {name} text"] * 9, 270).save(str(tmp_path / name / "tokenizer.json"))
    sha256 = fingerprint(model / "tokenizer.json")
    with ShardWriter(tmp_path / "data" / "val", vocab_size=64, eos_id=63, tokenizer_sha256=sha256) as writer:
        writer.write([i % VOCAB_SIZE for i in range(643)])

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    given = {"--models": str(model), "--data": str(tmp_path / "data"), "--output": str(tmp_path / "found"), **options}
    arguments = [fill(text) for pair in given.items() for text in pair]
    result = cli("evaluate", "lengths", *arguments)
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert fill(message) in error
    assert not (tmp_path / "found").exists()
