"""The short way of a RAT layer through one token: when it is taken, and that it is the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat import CausalLM
from rat.layers import Mixer, rat
from rat.layers.state import LayerState

D = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The longest row of each call of the one-token operation."""
    calls: list[int] = []
    op = rat.chunk_decode
    monkeypatch.setattr(rat, "chunk_decode", lambda *new, **rest: (calls.append(rest["longest"]), op(*new, **rest))[1])
    return calls


@pytest.fixture(params=["small", "no-positions", "ones", "long"])
def mixer(request: pytest.FixtureRequest, make_mixer: Callable[..., Mixer]) -> Mixer:
    return make_mixer("rat", request.param)


def prefilled(mixer: Mixer) -> LayerState:
    state = mixer.new_state(3)
    mixer.step(random(3, 9, D), state, torch.tensor([9, 4, 0]))
    return state


@torch.no_grad()
def test_both_ways_give_the_same(mixer: Mixer, short_ways: list[int], assert_close: Callable) -> None:
    short, long = prefilled(mixer), prefilled(mixer)
    for n, x in enumerate(random(3, 7, D, seed=1).split(1, dim=1)):
        assert_close(mixer.step(x, short), mixer.step(x, long, torch.ones(3, dtype=torch.long)))
        assert short_ways == list(range(9, 10 + n))
    assert short.lengths.tolist() == long.lengths.tolist() == [16, 11, 7]
    after = random(3, 5, D, seed=2)
    assert_close(mixer.step(after, short), mixer.step(after, long))


@torch.no_grad()
def test_rows_without_a_token_and_pieces_take_the_long_way(mixer: Mixer, short_ways: list[int]) -> None:
    state = prefilled(mixer)
    mixer.step(random(3, 1, D), state, torch.tensor([1, 0, 1]))
    mixer.step(random(3, 2, D), state)
    assert not short_ways


@torch.no_grad()
def test_the_caches_stay_where_they_are(make_mixer: Callable[..., Mixer]) -> None:
    mixer = make_mixer("rat")
    state = mixer.new_state(2, 12)
    before = {name: x.data_ptr() for name, x in state.tensors.items()}
    for x in random(2, 12, D).split(1, dim=1):
        mixer.step(x, state)
    assert {name: x.data_ptr() for name, x in state.tensors.items()} == before


def test_steps_that_need_a_gradient_have_the_one_of_the_full_pass(
    mixer: Mixer, short_ways: list[int], assert_close: Callable
) -> None:
    x, weight = random(2, 6, D), random(2, 6, D, seed=1)
    state = mixer.new_state(2, 6)
    steps = torch.cat([mixer.step(piece, state) for piece in x.split(1, dim=1)], dim=1)
    assert not short_ways
    found = torch.autograd.grad((steps * weight).sum(), [mixer.out_proj.weight])
    expected = torch.autograd.grad((mixer(x) * weight).sum(), [mixer.out_proj.weight])
    assert_close(found[0], expected[0])


def test_a_layer_whose_projection_alone_is_trained_takes_the_short_way(
    make_mixer: Callable[..., Mixer], short_ways: list[int], assert_close: Callable
) -> None:
    mixer = make_mixer("rat")
    for frozen in (mixer.in_proj.weight, mixer.gate_bias):
        frozen.requires_grad_(False)
    x, state = random(2, 5, D), mixer.new_state(2, 5)
    steps = torch.cat([mixer.step(piece, state) for piece in x.split(1, dim=1)], dim=1)
    assert len(short_ways) == 5
    found, expected = (torch.autograd.grad(y.square().sum(), mixer.out_proj.weight)[0] for y in (steps, mixer(x)))
    assert_close(found, expected)


def test_generation_takes_the_short_way_for_every_token_after_the_prompt(
    make_model: Callable[..., CausalLM], short_ways: list[int]
) -> None:
    make_model("rat").generate([[1, 2, 3], [4, 5, 6, 7, 8]], max_new_tokens=4)
    assert short_ways == [5, 5, 6, 6, 7, 7]  # two layers; the first new token comes from the prompt
