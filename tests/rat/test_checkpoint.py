"""Folders of `save_pretrained`: what comes back, what a failure leaves, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rat.checkpoint
from rat import CausalLM, ModelConfig
from rat.checkpoint import check_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def model(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model("rat", "sliding_window", "rnn", "attention")


@pytest.fixture
def saved(model: CausalLM, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Path, str])
def test_what_was_saved_comes_back_bit_for_bit(
    model: CausalLM, tmp_path: Path, dtype: torch.dtype, kind: Callable[[Path], Any], assert_same_weights: Callable
) -> None:
    folder = kind(tmp_path / "made" / "on the way")
    assert model.to(dtype).save_pretrained(folder) == Path(folder)
    assert sorted(path.name for path in Path(folder).iterdir()) == [CONFIG, WEIGHTS]
    loaded = CausalLM.from_pretrained(folder)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert all(p.requires_grad for p in loaded.parameters())
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids), model(ids))
    assert_same_weights(CausalLM.from_pretrained(folder, model.config), model)


def test_training_a_loaded_model_leaves_its_file_alone(
    model: CausalLM, saved: Path, assert_same_weights: Callable
) -> None:
    loaded, ids = CausalLM.from_pretrained(saved), torch.arange(9)[None]
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = loaded(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert_same_weights(CausalLM.from_pretrained(saved), model)


def test_saving_again_replaces_both_files(
    model: CausalLM, saved: Path, make_model: Callable[..., CausalLM], assert_same_weights: Callable
) -> None:
    other = make_model("attention", vocab_size=50)
    other.save_pretrained(saved)
    loaded = CausalLM.from_pretrained(saved)
    assert loaded.config == other.config != model.config
    assert_same_weights(loaded, other)


def write_half_and_fail(weights: dict[str, Tensor], path: Path, **options: Any) -> None:
    Path(path).write_bytes(b"half of a file")
    raise OSError("no space left on device")


def test_a_save_that_fails_leaves_the_old_files(
    model: CausalLM,
    saved: Path,
    make_model: Callable[..., CausalLM],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_weights: Callable,
) -> None:
    other = make_model("attention", vocab_size=50)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(rat.checkpoint, "save_file", write_half_and_fail)
        with pytest.raises(OSError, match="no space left"):
            other.save_pretrained(saved)
    with monkeypatch.context() as patch:
        patch.setattr(ModelConfig, "to_dict", lambda self: {"not": {"plain"}})
        with pytest.raises(TypeError, match="not JSON serializable"):
            other.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert_same_weights(CausalLM.from_pretrained(saved), model)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
        (lambda w: w.update(head=torch.zeros(2)), "head is not part of this model"),
        (
            lambda w: w.update({"layers.1.mixer.in_proj.weight": torch.zeros(4, 16)}),
            r"layers.1.mixer.in_proj.weight is \(4, 16\), this model's is \(48, 16\)",
        ),
        (
            lambda w: (w.pop("norm.weight"), w.update(head=torch.zeros(2), other=torch.zeros(1))),
            "norm.weight is missing; head is not part of this model; other is not part of this model$",
        ),
        (lambda w: w.clear(), r"embedding.weight is missing; .*\(and \d\d more\)$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Callable[[Any], object], message: str) -> None:
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=f"model does not fit the model: .*{message}"):
        CausalLM.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_damaged_file_of_weights_is_named(saved: Path, size: int) -> None:
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read, copy it again: "):
        CausalLM.from_pretrained(saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: .* is not a folder of save_pretrained"):
        CausalLM.from_pretrained(saved)


def test_a_path_with_nothing_at_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: neither a folder with config.json nor a .pth"):
        CausalLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 4}, r"config.json: unknown keys \['n_layer'\]; a model config has"),
        ({"chunk_size": 0}, "config.json: chunk_size must be a whole number of at least 1, got 0"),
        ({"d_model": 32}, "does not fit the model: embedding.weight is"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved: Path, change: dict[str, int], message: str) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        CausalLM.from_pretrained(saved)


def test_another_architecture_than_the_one_given_is_refused(saved: Path, model: CausalLM) -> None:
    given = ModelConfig.from_dict(model.config.to_dict() | {"chunk_size": 8, "rope_base": None})
    with pytest.raises(
        ValueError, match=r"model holds another model: chunk_size is 4, not 8; rope_base is 10000.0, not None$"
    ):
        CausalLM.from_pretrained(saved, given)
    with pytest.raises(ValueError, match=r"has its own config.json: give a whole ModelConfig"):
        CausalLM.from_pretrained(saved, {"chunk_size": 4})


def test_whole_numbers_are_no_weights(make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    model = make_model("rat")
    weights = dict(model.state_dict())
    expected = {name: x.shape for name, x in weights.items()}
    weights["norm.weight"] = weights["norm.weight"].long()
    with pytest.raises(ValueError, match=r"norm.weight holds torch.int64, no floating-point numbers"):
        check_weights(expected, weights, "a file")
