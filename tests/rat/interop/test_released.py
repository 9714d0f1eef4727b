"""Checkpoints of the released code: read under our names, asked about, never run."""

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rat import CausalLM
from rat.config import MixerName
from rat.interop.released import HEAD, NAMES, rename

TASK = dict[str, Tensor]


def released_names(model: CausalLM) -> TASK:
    """The weights under the names of the released code, compiled as its runs were."""
    layers = range(len(model.layers))
    theirs = {ours.format(n=n): name.format(n=n) for name, ours in NAMES.items() for n in layers}
    return {f"_orig_mod.{theirs[name]}": x.clone() for name, x in model.state_dict().items()}


@pytest.fixture
def model(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model("rat", "sliding_window", num_layers=4)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file in the released layout."""

    def make(task: object, config: object = None, **rest: object) -> Path:
        path = tmp_path / "released.pth"
        torch.save({"task": task, "config": config or {}, "step": 7, "optimizer": {}, **rest}, path)
        return path

    return make


def cells(*tables: dict[str, Any]) -> dict[str, Any]:
    """The file's own config, as deep as the released code nests it."""
    names = ["seq_cell", "seq_cell_two"]
    return {"model": {"backbone": {"layer": dict(zip(names, tables, strict=False))}}}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("with_head", [True, False])
def test_a_given_architecture_is_taken(
    model: CausalLM, write: Callable, compiled: bool, with_head: bool, assert_same_weights: Callable
) -> None:
    task = released_names(model)
    if with_head:
        task["_orig_mod." + HEAD] = model.embedding.weight.detach().clone()
    if not compiled:
        task = {name.removeprefix("_orig_mod."): x for name, x in task.items()}
    loaded = CausalLM.from_pretrained(write(task), model.config)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert all(p.requires_grad for p in loaded.parameters())


def test_every_name_is_ours_and_unknown_ones_stay(model: CausalLM) -> None:
    ours = [rename(name.removeprefix("_orig_mod.")) for name in released_names(model)]
    assert ours == list(model.state_dict())
    assert rename("backbone.layers.12.seq_layer.gate_bias") == "layers.12.mixer.gate_bias"
    for name in ("backbone.layers.1.seq_layer.other", "backbone.layers.x.seq_layer.gate_bias", "optimizer"):
        assert rename(name) == name


INFERRED: list[tuple[list[MixerName], list[dict[str, Any]]]] = [
    (["rat"], [{"d_head": 4, "chunk_size": 4}]),
    (["rat", "sliding_window"], [{"d_head": 4, "chunk_size": 4}, {"d_head": 4, "window_size": 3}]),
    (["attention"], [{"d_head": 4}]),
    (["sliding_window"], [{"d_head": 4, "window_size": 3}]),
    (["attention", "sliding_window"], [{"d_head": 4}, {"d_head": 4, "window_size": 3}]),
    (["rnn"], [{"d_head": 4}]),
]


@pytest.mark.parametrize(("pattern", "told"), INFERRED, ids=lambda x: "-".join(map(str, x)))
def test_the_architecture_is_read_from_shapes_and_the_files_config(
    make_model: Callable[..., CausalLM],
    write: Callable,
    pattern: list[MixerName],
    told: list[dict[str, Any]],
    assert_same_weights: Callable,
) -> None:
    model = make_model(*pattern, num_layers=4)
    loaded = CausalLM.from_pretrained(write(released_names(model), cells(*told)))
    assert loaded.config.layer_names() == model.config.layer_names()
    assert_same_weights(loaded, model)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), model(ids))


def test_what_the_caller_tells_wins_over_the_file(model: CausalLM, write: Callable) -> None:
    path = write(released_names(model), cells({"d_head": 4, "chunk_size": 99}, {"window_size": 3}))
    loaded = CausalLM.from_pretrained(path, {"chunk_size": 4, "max_seq_len": 24, "init_std": 0.5})
    assert (loaded.config.chunk_size, loaded.config.max_seq_len, loaded.config.init_std) == (4, 24, 0.5)
    with pytest.raises(ValueError, match=r"unknown keys \['chunksize'\]"):
        CausalLM.from_pretrained(path, {"chunksize": 4})


@pytest.mark.parametrize(
    ("pattern", "told", "missing"),
    [
        (["rat"], [], "num_heads, chunk_size"),
        (["rat"], [{"d_head": 4}], "chunk_size"),
        (["rat", "sliding_window"], [], "num_heads, chunk_size, window_size"),
        (["attention"], [], "num_heads, pattern"),
        (["rnn"], [], "num_heads"),
    ],
)
def test_a_file_that_leaves_something_open_asks_for_it(
    make_model: Callable[..., CausalLM],
    write: Callable,
    pattern: list[MixerName],
    told: list[dict[str, Any]],
    missing: str,
    assert_same_weights: Callable,
) -> None:
    model = make_model(*pattern, num_layers=4)
    path = write(released_names(model), cells(*told))
    fields = ", ".join(f"'{name}': ..." for name in missing.split(", "))
    with pytest.raises(
        ValueError, match=rf"does not tell its {missing}: .*from_pretrained\('released.pth', \{{{fields}\}}\)"
    ):
        CausalLM.from_pretrained(path)
    given = {name: getattr(model.config, name) for name in missing.split(", ")}
    assert_same_weights(CausalLM.from_pretrained(path, given), model)


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["task", "config", "rest"])
def test_nothing_in_a_hostile_file_is_run(
    model: CausalLM, write: Callable, tmp_path: Path, zipped: bool, place: str
) -> None:
    marker, path = tmp_path / "the file was run", tmp_path / "released.pth"
    hostile = Marker(marker)
    task, config, rest = released_names(model), cells({"d_head": 4, "chunk_size": 4}), {}
    {"task": task, "config": config, "rest": rest}[place]["hostile"] = hostile
    if zipped:
        write(task, config, **rest)
    else:
        path.write_bytes(pickle.dumps({"task": {"hostile": hostile}}, protocol=2))
    with pytest.raises(
        ValueError, match=f"released.pth is .*none of it was run: .*{os.mkdir.__module__}.mkdir"
    ) as error:
        CausalLM.from_pretrained(path, model.config)
    assert not marker.exists()
    assert "weights_only" not in str(error.value)  # no advice to load it anyway
    # It would have been run.
    if zipped:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.is_dir()


class Custom:
    """A class of the released code, say."""


def test_objects_that_are_no_plain_data_are_refused_by_name(model: CausalLM, write: Callable) -> None:
    path = write(released_names(model), lr_scheduler=Custom())
    with pytest.raises(ValueError, match=r"none of it was run: .*Custom"):
        CausalLM.from_pretrained(path, model.config)


def test_files_that_name_easydict_load_without_it(golden: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easydict", None)  # importing it fails, whether installed or not
    case = golden("rat")
    with zipfile.ZipFile(case.folder / "released_layout.pth") as content:
        pickled = next(name for name in content.namelist() if name.endswith("data.pkl"))
        assert b"easydict" in content.read(pickled)
    CausalLM.from_pretrained(case.folder / "released_layout.pth", case.config)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-500], lambda b: b"no checkpoint" * 9]
)
def test_a_damaged_file_is_named(model: CausalLM, write: Callable, damage: Callable[[bytes], bytes]) -> None:
    path = write(released_names(model))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"released.pth is damaged"):
        CausalLM.from_pretrained(path, model.config)


def without(task: TASK, *names: str) -> TASK:
    return {name: x for name, x in task.items() if not any(part in name for part in names)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: without(task, "layers.2.seq_layer.out_proj"), "layers.2.mixer.out_proj.weight is missing"),
        (lambda task: task | {"_orig_mod.extra": torch.zeros(1)}, "extra is not part of this model"),
        (
            lambda task: task | {"_orig_mod.backbone.ln.weight": torch.zeros(3)},
            r"norm.weight is \(3,\), this model's is \(16,\)",
        ),
        (
            lambda task: task | {"_orig_mod." + HEAD: torch.zeros(40, 16)},
            "head.lm_head.weight differs from embedding.wte.weight, but the head is tied",
        ),
        (lambda task: task | {"_orig_mod.backbone.ln.weight": 3}, "backbone.ln.weight is no tensor, but int"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    model: CausalLM, write: Callable, change: Callable[[TASK], TASK], message: str
) -> None:
    path = write(change(released_names(model)))
    for config in (model.config, {"num_heads": 4, "chunk_size": 4, "window_size": 3}):
        with pytest.raises(ValueError, match=f"released.pth.*{message}"):
            CausalLM.from_pretrained(path, config)


@pytest.mark.parametrize("gone", ["wte", "layers.1.", "layers"])
def test_an_architecture_cannot_be_read_from_half_the_weights(model: CausalLM, write: Callable, gone: str) -> None:
    path = write(without(released_names(model), gone), cells({"d_head": 4, "chunk_size": 4}))
    with pytest.raises(ValueError, match=r"released.pth: no embedding.wte.weight, or layers are missing"):
        CausalLM.from_pretrained(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"task": 3}, [1, 2], torch.zeros(2)])
def test_another_layout_is_no_released_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth is no checkpoint of the released code: no weights under 'task'"):
        CausalLM.from_pretrained(tmp_path / "other.pth")


@pytest.mark.parametrize("odd", [None, torch.zeros(3, 3), torch.zeros(())])
def test_a_projection_that_is_missing_or_odd_is_named_alone(
    model: CausalLM, write: Callable, odd: Tensor | None
) -> None:
    task = released_names(model)
    name = "_orig_mod.backbone.layers.0.seq_layer.in_proj.weight"
    del task[name]
    if odd is not None:
        task[name] = odd
    known = {name: getattr(model.config, name) for name in ("num_heads", "chunk_size", "window_size")}
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj.weight is") as caught:
        CausalLM.from_pretrained(write(task), known)
    assert "layers.1" not in str(caught.value)
    assert "layers.2" not in str(caught.value)
