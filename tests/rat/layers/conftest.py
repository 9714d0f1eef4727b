"""Every mixer in settings that put chunk and window borders inside, at and beyond a short sequence."""

from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
from torch import nn

from rat import ModelConfig
from rat.config import MixerName
from rat.layers import Mixer
from rat.model import MIXERS

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"chunk_size": 4, "window_size": 3},
    "no-positions": {"chunk_size": 4, "window_size": 3, "rope_base": None},
    "ones": {"chunk_size": 1, "window_size": 1},
    "long": {"chunk_size": 64, "window_size": 64},
}
MakeMixer = Callable[..., Mixer]


@pytest.fixture(scope="session")
def make_mixer(stir: Callable[[nn.Module], None]) -> MakeMixer:
    """A mixer of width 16 with 4 heads in 2 groups, by the name that a pattern gives it."""

    def make(name: MixerName, setting: str = "small") -> Mixer:
        values = {"vocab_size": 1, "d_model": 16, "num_layers": 1, "num_heads": 4, "max_seq_len": 24}
        mixer = MIXERS[name](ModelConfig(**values, pattern=[name], **SETTINGS[setting]))
        stir(mixer)
        return mixer

    return make


@pytest.fixture(scope="session", params=get_args(MixerName))
def name(request: pytest.FixtureRequest) -> MixerName:
    """Every mixer."""
    return request.param


@pytest.fixture(scope="session", params=product(get_args(MixerName), SETTINGS), ids="-".join)
def mixer(request: pytest.FixtureRequest, make_mixer: MakeMixer) -> Mixer:
    """Every mixer in every setting."""
    return make_mixer(*request.param)
