"""The three ways in which a layer is used, as functions to be timed."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rat.benchmarks.floors import Mode
from rat.benchmarks.masked import MaskedRAT
from rat.layers import LayerState, Mixer

Step = Callable[[], object]


def make_step(layer: Mixer, mode: Mode, batch_size: int, seq_len: int) -> Step:
    """One run of `layer` in a mode, on random input; B rows of T tokens, or one token each at position T."""
    if mode == "train":
        return _train(layer, batch_size, seq_len)
    if mode == "prefill":
        return _prefill(layer, batch_size, seq_len)
    return _decode(layer, batch_size, seq_len)


def random_input(layer: Mixer, batch_size: int, seq_len: int) -> Tensor:
    """(B, T, D) normal numbers on the layer's device, in its dtype."""
    weight = layer.in_proj.weight
    return torch.randn(batch_size, seq_len, layer.d_model, device=weight.device).to(weight.dtype)


def fill(state: LayerState, position: int) -> None:
    """Make `state` one of rows that stand at `position`, with random numbers for what they have seen."""
    for x in state.tensors.values():
        x.normal_()
    state.lengths = torch.full_like(state.lengths, position)
    state.longest = position


def _train(layer: Mixer, batch_size: int, seq_len: int) -> Step:
    """Forward, and backward from a given gradient of the output to the input's and all weights'."""
    x = random_input(layer, batch_size, seq_len).requires_grad_()
    grad = random_input(layer, batch_size, seq_len)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def _prefill(layer: Mixer, batch_size: int, seq_len: int) -> Step:
    """A whole prompt into an empty state; only a full pass where the layer is a form of RAT that has no other state."""
    x = random_input(layer, batch_size, seq_len)
    empty = layer.new_state(batch_size, seq_len)

    @torch.inference_mode()
    def run() -> Tensor:
        return layer(x) if isinstance(layer, MaskedRAT) else layer.step(x, _fork(empty))

    return run


def _decode(layer: Mixer, batch_size: int, seq_len: int) -> Step:
    """One token a row, always from the same position; room for it is there."""
    x = random_input(layer, batch_size, 1)
    state = layer.new_state(batch_size, seq_len + 1)
    fill(state, seq_len)

    @torch.inference_mode()
    def run() -> Tensor:
        return layer.step(x, _fork(state))

    return run


def _fork(state: LayerState) -> LayerState:
    """A state whose length advances by itself, on the same memory: what it has seen changes, which costs nothing."""
    return replace(state, lengths=state.lengths.clone(), tensors=dict(state.tensors))
