"""Parameters, FLOPs and cache bytes of whole models: the paper's, and what PyTorch itself counts."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rat import CausalLM, ModelConfig
from rat.config import MixerName

# The paper's XL.
V, D, N, GD, L, W, T = 32_000, 2048, 24, 2 * 128, 16, 1024, 4096
FEED_FORWARD = 8 * D**2
# Parameters, forward FLOPs a token, cache elements and how many of them a recurrence keeps in fp32, of one mixer.
MIXERS: dict[MixerName, tuple[int, int, int, int]] = {
    "rat": (
        (4 * D + 2 * GD) * D + D,
        2 * (4 * D + 2 * GD) * D + 2 * T // L * D,
        2 * T // L * D + 2 * D,
        2 * D,
    ),
    "attention": (4 * D**2, 8 * D**2 + 2 * T * D, 2 * T * D, 0),
    "sliding_window": (4 * D**2, 8 * D**2 + 4 * W * D, 2 * (W + 1) * D, 0),
    "rnn": (4 * D**2 + D, 8 * D**2, D, D),
}
BACKBONES: list[tuple[tuple[MixerName, ...], str]] = [
    (("attention",), "1.274"),
    (("rat",), "1.299"),
    (("rat", "sliding_window"), "1.286"),
    (("attention", "sliding_window"), "1.274"),
    (("rnn",), "1.274"),
    (("sliding_window",), "1.274"),
]


@pytest.mark.parametrize(("pattern", "billions"), BACKBONES, ids=str)
def test_the_papers_models_have_their_size(pattern: tuple[MixerName, ...], billions: str) -> None:
    with torch.device("meta"):
        model = CausalLM(ModelConfig(vocab_size=V, d_model=D, num_layers=N, num_heads=16, pattern=pattern))
    layers = [MIXERS[pattern[n % len(pattern)]] for n in range(N)]
    parameters, flops, elements, wide = (sum(column) for column in zip(*layers, strict=True))
    assert model.num_parameters() == V * D + D + N * (FEED_FORWARD + 2 * D) + parameters
    assert f"{model.num_parameters() / 1e9:.3f}" == billions
    assert model.flops_per_token(T) == 2 * V * D + N * 2 * FEED_FORWARD + flops
    assert model.cache_bytes(T) == 2 * (elements - wide) + 4 * wide
    assert model.cache_bytes(T, bytes_per_element=4) == 4 * elements


@pytest.mark.parametrize("name", get_args(MixerName))
def test_pytorch_counts_the_same_flops(
    name: MixerName, make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor]
) -> None:
    model, ids = make_model(name), random_ids(3, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    # Projections, feed-forward and head are plain matrix products; attention over T keys is not among them.
    attention = {"rat": 2 * 8 // 4 * 16, "attention": 2 * 8 * 16, "sliding_window": 4 * 3 * 16, "rnn": 0}[name]
    assert counts["aten.mm"] == ids.numel() * (model.flops_per_token(8) - len(model.layers) * attention)


@pytest.mark.parametrize("name", get_args(MixerName))
@torch.no_grad()
def test_a_filled_state_takes_the_bytes_foretold(
    name: MixerName, make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor]
) -> None:
    model = make_model(name, "sliding_window")
    for length in (1, 8, 9, 21):
        state = model.new_state(3, length)
        model.step(random_ids(3, length), state)
        assert sum(part.num_bytes() for part in state) == 3 * model.cache_bytes(length, bytes_per_element=4)
