"""A state taken back goes on as if it had never gone further, or says that it cannot."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rat import CausalLM, ModelConfig
from rat.config import MixerName
from rat.layers import LayerState, Mixer

BEFORE, MORE = 13, 7


def read(mixer: Mixer, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, LayerState]:
    state = mixer.new_state(len(x))
    return mixer.step(x, state, lengths), state


@torch.no_grad()
def test_cropped_states_go_on_as_if_nothing_had_been(mixer: Mixer) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, BEFORE, 16), torch.randn(2, MORE, 16)
    before = torch.tensor([BEFORE, BEFORE - 2])
    tried = 0
    for after in range(BEFORE + 1):
        wanted = torch.tensor([after, min(after, BEFORE - 2)])
        _, state = read(mixer, x, before)
        try:
            mixer.crop(state, wanted)
        except ValueError:
            continue
        tried += 1
        fresh = mixer.new_state(2)
        if after:
            mixer.step(x[:, :after], fresh, wanted)
        assert state.lengths.tolist() == wanted.tolist()
        assert state.longest == after
        torch.testing.assert_close(mixer.step(y, state), mixer.step(y, fresh), rtol=1e-5, atol=1e-5)
    assert tried >= 2


ALLOWED: dict[MixerName, list[int]] = {
    "attention": list(range(BEFORE + 1)),
    "rat": [0, 4, 8, 12, BEFORE],
    "sliding_window": [BEFORE - 1, BEFORE],
    "rnn": [0, BEFORE],
}


@torch.no_grad()
def test_how_far_each_can_go_back(make_mixer: Callable[..., Mixer], name: MixerName) -> None:
    mixer = make_mixer(name)
    for after in range(BEFORE + 1):
        _, state = read(mixer, torch.randn(1, BEFORE, 16), torch.tensor([BEFORE]))
        if after in ALLOWED[name]:
            mixer.crop(state, torch.tensor([after]))
        else:
            with pytest.raises(ValueError, match=rf"cannot go back from 13 to {after} tokens \(row 0\).*`select`"):
                mixer.crop(state, torch.tensor([after]))
            assert state.lengths.tolist() == [BEFORE]


@torch.no_grad()
def test_a_window_that_has_lost_nothing_can_go_anywhere(make_mixer: Callable[..., Mixer]) -> None:
    mixer = make_mixer("sliding_window", "long")
    for after in range(BEFORE + 1):
        _, state = read(mixer, torch.randn(1, BEFORE, 16), torch.tensor([BEFORE]))
        mixer.crop(state, torch.tensor([after]))


@pytest.mark.parametrize("lengths", [[5, 14], [-1, 3], [3]])
@torch.no_grad()
def test_lengths_that_no_row_has(make_mixer: Callable[..., Mixer], lengths: list[int]) -> None:
    mixer = make_mixer("attention")
    _, state = read(mixer, torch.randn(2, BEFORE, 16), torch.tensor([BEFORE, BEFORE]))
    with pytest.raises(ValueError, match=r"cannot crop rows of \[13, 13\] tokens to"):
        mixer.crop(state, torch.tensor(lengths))


@torch.no_grad()
def test_a_model_crops_all_its_layers_or_none(stir: Callable[[nn.Module], None]) -> None:
    config = ModelConfig(
        vocab_size=9, d_model=16, num_layers=2, num_heads=2, pattern=["rat", "sliding_window"], chunk_size=4,
        window_size=8,
    )  # fmt: skip
    model = CausalLM(config)
    stir(model)
    ids = torch.randint(9, (1, 12))
    state, fresh = model.new_state(1), model.new_state(1)
    model.step(ids[:, :9], state)
    with pytest.raises(ValueError, match="RAT cannot go back from 9 to 6"):
        model.crop(state, torch.tensor([6]))
    model.crop(state, torch.tensor([8]))
    model.step(ids[:, :8], fresh)
    torch.testing.assert_close(model.step(ids[:, 8:], state), model.step(ids[:, 8:], fresh), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="SlidingWindowAttention cannot go back from 12 to 8"):
        model.crop(state, torch.tensor([8]))
    assert {int(part.lengths) for part in state} == {12}
