"""How every weight starts."""

import math
from typing import Any

import pytest
import torch

from rat import CausalLM, ModelConfig
from rat.config import MixerName
from rat.initialization import initialize
from rat.layers import GatedMixer


def make(*pattern: MixerName, **fields: Any) -> CausalLM:
    torch.manual_seed(0)
    values = {"vocab_size": 300, "d_model": 64, "num_layers": 4, "num_heads": 4} | fields
    return CausalLM(ModelConfig(pattern=pattern, **values))


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_linear_and_embedding_weights_have_the_standard_deviation(std: float) -> None:
    model = make("rat", "sliding_window", "rnn", "attention", init_std=std)
    matrices = [(name, x) for name, x in model.named_parameters() if x.ndim == 2]
    assert len(matrices) == 1 + 4 * 4
    for name, x in matrices:
        # five standard errors of each estimate
        assert x.mean().abs() < 5 * std / x.numel() ** 0.5, name
        assert abs(x.std() / std - 1) < 5 / (2 * x.numel()) ** 0.5, name
        assert x.abs().max() > 3 * std, name  # normal, not uniform


def test_norms_start_as_ones() -> None:
    norms = [x for name, x in make("rat", "attention").named_parameters() if "norm" in name]
    assert len(norms) == 9
    assert all(bool((x == 1).all()) for x in norms)


@pytest.mark.parametrize(
    ("name", "fields", "span"),
    [("rat", {"chunk_size": 16}, 16), ("rat", {"chunk_size": 300}, 300), ("rnn", {"max_seq_len": 50}, 50)],
)
def test_gates_start_as_the_log_of_a_uniform_draw(name: MixerName, fields: dict[str, int], span: int) -> None:
    # chunk_size does not reach the RNN, nor max_seq_len RAT
    model = make(name, **{"chunk_size": 7, "max_seq_len": 9} | fields, d_model=256, vocab_size=2)
    drawn = torch.cat([layer.mixer.gate_bias for layer in model.layers]).detach().exp()
    low, high = 1.0, span - 1.0
    assert drawn.min() >= low - 1e-4
    assert drawn.max() <= high + 1e-3
    share = torch.histc((drawn - low) / (high - low), 4, 0, 1) / len(drawn)
    assert (share - 0.25).abs().max() < 0.06


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_chunk_with_nothing_to_span_has_gates_of_one_half(chunk_size: int) -> None:
    model = make("rat", chunk_size=chunk_size)
    assert all(bool((layer.mixer.gate_bias == 0).all()) for layer in model.layers)
    assert math.isfinite(model(torch.arange(8)[None], torch.arange(8)[None]).item())


def test_every_weight_is_drawn() -> None:
    model = make("rat", "sliding_window", "rnn", "attention")
    for x in model.state_dict().values():
        x.fill_(math.nan)
    initialize(model, 0.02)
    assert all(bool(x.isfinite().all()) for x in model.state_dict().values())
    # Two layers alike start differently, and a seed tells how.
    gates = [layer.mixer.gate_bias for layer in model.layers if isinstance(layer.mixer, GatedMixer)]
    assert not torch.equal(gates[0], gates[1])
    first, second = (make("rat", "rnn").state_dict() for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
