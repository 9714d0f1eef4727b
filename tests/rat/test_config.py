"""The model config: refused at once, frozen, and the same after a trip through JSON."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rat import ModelConfig
from rat.config import MixerName

SMALL: dict[str, Any] = {"vocab_size": 10, "d_model": 16, "num_layers": 2, "num_heads": 4}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    count = st.integers(1, 2**40)
    groups, per_group, half = (draw(st.integers(1, 8)) for _ in range(3))
    pattern = draw(st.lists(st.sampled_from(get_args(MixerName)), min_size=1, max_size=4))
    required = {
        "vocab_size": draw(count),
        "d_model": 2 * half * groups * per_group,
        "num_layers": draw(st.integers(len(pattern), 40)),
        "num_heads": groups * per_group,
    }
    optional = {
        "pattern": st.just(pattern),
        "chunk_size": count,
        "num_groups": st.just(groups),
        "window_size": count,
        "rope_base": st.none() | st.floats(1.5, 1e9),
        "max_seq_len": count,
        "norm_eps": st.floats(1e-12, 1),
        "init_std": st.floats(1e-6, 10),
    }
    chosen = draw(st.fixed_dictionaries({"num_groups": optional.pop("num_groups")}, optional=optional))
    return required | chosen


@given(values=configs())
def test_every_valid_config_survives_json(values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain == config.to_dict()
    assert {name: plain[name] for name in values} == values
    again = ModelConfig.from_dict(plain)
    assert again == config
    assert hash(again) == hash(config)


def test_the_defaults_are_the_papers() -> None:
    assert ModelConfig(**SMALL).to_dict() == SMALL | {
        "pattern": ["rat"], "chunk_size": 16, "num_groups": 2, "window_size": 1024, "rope_base": 10000.0,
        "max_seq_len": 4096, "norm_eps": 1e-6, "init_std": 0.02,
    }  # fmt: skip


def test_a_file_gives_the_config_it_holds(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL, pattern=["attention", "sliding_window"], rope_base=None)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_json(tmp_path / "config.json") == config


def test_a_config_is_frozen_and_keyword_only() -> None:
    config = ModelConfig(**SMALL)
    with pytest.raises(FrozenInstanceError):
        config.d_model = 32  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(10, 16, 2, 4)  # type: ignore[misc]
    with pytest.raises(TypeError, match="chunksize"):
        ModelConfig(**SMALL, chunksize=3)


def test_a_pattern_repeats_until_the_layers_are_reached() -> None:
    config = ModelConfig(**SMALL | {"num_layers": 5}, pattern=["rat", "sliding_window"])
    assert config.layer_names() == ["rat", "sliding_window", "rat", "sliding_window", "rat"]


COUNTS = ["vocab_size", "d_model", "num_layers", "num_heads", "chunk_size", "num_groups", "window_size", "max_seq_len"]


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", None, True])
def test_a_count_that_is_no_positive_whole_number_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be a whole number of at least 1, got {value!r}"):
        ModelConfig(**SMALL | {field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_eps": 0.0}, "^norm_eps must be above 0, got 0.0"),
        ({"norm_eps": float("nan")}, "^norm_eps must be above 0, got nan"),
        ({"norm_eps": "1e-6"}, "^norm_eps must be above 0, got '1e-6'"),
        ({"rope_base": "1e4"}, "^rope_base must be above 1, .*got '1e4'"),
        ({"init_std": -0.02}, "^init_std must be above 0, got -0.02"),
        ({"rope_base": 1.0}, "^rope_base must be above 1, or null for no positions, got 1.0"),
        ({"rope_base": 0.0}, "^rope_base must be above 1"),
        ({"rope_base": float("nan")}, "^rope_base must be above 1"),
        ({"pattern": []}, "^pattern must name"),
        ({"pattern": ["rat", "mamba"]}, r"^pattern must name \('rat', .*got \['rat', 'mamba'\]"),
        ({"pattern": "rat"}, "^pattern must name"),
        ({"pattern": ["rat"] * 3}, "^pattern has 3 mixers for num_layers 2"),
        ({"d_model": 18}, "^d_model 18 is not divisible by num_heads 4"),
        ({"num_groups": 3}, "^num_heads 4 is not divisible by num_groups 3"),
        ({"d_model": 12}, "rotary positions need an even head width, got 3"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": ["attention"], "num_groups": 3},  # only RAT has groups
        {"pattern": ["rnn"], "d_model": 12},  # no positions, so an odd head width
        {"rope_base": None, "d_model": 12},
    ],
)
def test_what_no_layer_reads_is_no_obstacle(fields: dict[str, Any]) -> None:
    ModelConfig(**SMALL | fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("chunk_size", "chunksize"), r"unknown keys \['chunksize'\]; a model config has"),
        (lambda text: text.replace('"d_model": 16, ', ""), "missing .*'d_model'"),
        (lambda text: text.replace("16", "-16", 1), "d_model must be a whole number of at least 1, got -16"),
        (lambda text: text[:20], "holds no model config"),
        (lambda text: "[1, 2]", "holds no model config, but a list"),
    ],
)
def test_a_file_that_holds_no_config_is_named(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(change(json.dumps(ModelConfig(**SMALL).to_dict())))
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        ModelConfig.from_json(path)
