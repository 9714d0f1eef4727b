"""The formulas of docs/method.md are those of the code."""

import re
from math import ceil
from pathlib import Path
from typing import get_args

import pytest
import torch

from rat import CausalLM
from rat.config import MixerName, ModelConfig
from rat.layers import Mixer
from rat.model import MIXERS

METHOD = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
SIZES = [
    {"D": 48, "H": 6, "G": 3, "L": 5, "W": 7, "T": 23},
    {"D": 48, "H": 6, "G": 2, "L": 1, "W": 30, "T": 24},
    {"D": 2048, "H": 16, "G": 2, "L": 16, "W": 1024, "T": 4096},
]
ROW = re.compile(r"^\| (\w+) \| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", re.MULTILINE)
# What a layer and a model add to their mixers: parameters and FLOPs of each.
ADDED = re.search(
    r"each layer adds `(.+?)` .*? and `(.+?)` FLOPs, and the model `(.+?)` .*? and `(.+?)` FLOPs", METHOD, re.DOTALL
)
FORMULAS = {row[0]: row[1:] for row in ROW.findall(METHOD)}


def config(name: MixerName, sizes: dict[str, int]) -> ModelConfig:
    return ModelConfig(
        vocab_size=9, d_model=sizes["D"], num_layers=1, num_heads=sizes["H"], pattern=[name], chunk_size=sizes["L"],
        num_groups=sizes["G"], window_size=sizes["W"], max_seq_len=sizes["T"],
    )  # fmt: skip


def mixer(name: MixerName, sizes: dict[str, int]) -> Mixer:
    with torch.device("meta"):
        return MIXERS[name](config(name, sizes))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", get_args(MixerName))
def test_costs(name: MixerName, sizes: dict[str, int]) -> None:
    names = sizes | {"d": sizes["D"] // sizes["H"], "ceil": ceil, "min": min}
    parameters, flops, cache, wide = (eval(formula, {}, names) for formula in FORMULAS[name])
    layer = mixer(name, sizes)
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert layer.flops_per_token(sizes["T"]) == flops
    assert layer.cache_elements(sizes["T"]) == cache
    assert layer.recurrent_elements == wide
    assert ADDED
    names["V"] = 9
    layer_parameters, layer_flops, model_parameters, model_flops = (eval(text, {}, names) for text in ADDED.groups())
    with torch.device("meta"):
        model = CausalLM(config(name, sizes))
    assert model.num_parameters() == model_parameters + layer_parameters + parameters
    assert model.flops_per_token(sizes["T"]) == model_flops + layer_flops + flops


def test_shares_of_the_papers_layer() -> None:
    rat, attention = (mixer(name, SIZES[-1]) for name in ("rat", "attention"))
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", METHOD, re.MULTILINE)
    assert len(rows) == 3
    for length, flops, cache in rows:
        n = int(length)
        assert f"{rat.flops_per_token(n) / attention.flops_per_token(n):.2f}" == flops
        assert f"{rat.cache_elements(n) / attention.cache_elements(n):.3f}" == cache
