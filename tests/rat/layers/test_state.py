"""What is common to the decoding states of all mixers: room, rows, files, devices."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rat.config import MixerName
from rat.layers import LayerState


def make(*lengths: int) -> LayerState:
    keys = torch.arange(len(lengths) * 2 * 3 * 4.0).reshape(len(lengths), 2, 3, 4)
    return LayerState(lengths=torch.tensor(lengths), longest=max(lengths), tensors={"keys": keys})


def test_rows_advance_by_what_is_their_own() -> None:
    state = LayerState.empty(2, torch.device("cpu"))
    state.advance(3, torch.tensor([3, 1]))
    state.advance(2, None)
    assert state.lengths.tolist() == [5, 3]
    assert state.longest == 5


def test_lengths_handed_out_before_stay_what_they_were() -> None:
    state = make(1, 2)
    before = state.lengths
    state.advance(4, None)
    assert before.tolist() == [1, 2]


def test_room_is_made_in_doublings_and_keeps_what_is_there() -> None:
    state = make(3, 1)
    keys = state.tensors["keys"]
    state.reserve(3, "keys")
    assert state.tensors["keys"] is keys
    state.reserve(4, "keys")
    assert state.tensors["keys"].shape == (2, 2, 6, 4)
    state.reserve(20, "keys")
    assert state.tensors["keys"].shape == (2, 2, 20, 4)
    assert torch.equal(state.tensors["keys"][:, :, :3], keys)
    assert not state.tensors["keys"][:, :, 3:].any()


def test_selected_rows_are_copies() -> None:
    state = make(3, 1, 2)
    fork = state.select(torch.tensor([2, 2, 0]))
    assert fork.lengths.tolist() == [2, 2, 3]
    assert torch.equal(fork.tensors["keys"], state.tensors["keys"][[2, 2, 0]])
    fork.tensors["keys"].zero_()
    fork.advance(1, None)
    assert state.tensors["keys"].any()
    assert state.lengths.tolist() == [3, 1, 2]
    assert state.longest == 3


def test_a_state_moves_whole() -> None:
    state = make(3, 1)
    away = state.to("meta")
    assert {x.device.type for x in away.state_dict().values()} == {"meta"}
    assert away.longest == 3
    assert {x.device.type for x in state.state_dict().values()} == {"cpu"}


def test_its_bytes_are_those_of_its_tensors() -> None:
    assert make(3, 1).num_bytes() == 2 * 2 * 3 * 4 * 4


@pytest.mark.parametrize("format_", ["torch", "safetensors"])
@torch.no_grad()
def test_a_saved_state_goes_on_where_it_stood(
    make_mixer: Callable, name: MixerName, format_: str, tmp_path: Path
) -> None:
    mixer = make_mixer(name)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    state = mixer.new_state(2)
    mixer.step(x[:, :7], state, torch.tensor([7, 3]))
    if format_ == "torch":
        torch.save(state.state_dict(), tmp_path / "state")
        saved = torch.load(tmp_path / "state", weights_only=True)
    else:
        save_file(state.state_dict(), tmp_path / "state")
        saved = load_file(tmp_path / "state")
    loaded = LayerState.from_state_dict(saved)
    assert loaded.lengths.tolist() == [7, 3]
    assert loaded.longest == 7
    for piece in x[:, 7:].split([1, 4], dim=1):
        assert torch.equal(mixer.step(piece, loaded), mixer.step(piece, state))


@torch.no_grad()
def test_an_empty_state_can_be_saved(make_mixer: Callable, name: MixerName) -> None:
    mixer, x = make_mixer(name), torch.ones(2, 3, 16)
    loaded = LayerState.from_state_dict(mixer.new_state(2).state_dict())
    assert torch.equal(mixer.step(x, loaded), mixer.step(x, mixer.new_state(2)))
