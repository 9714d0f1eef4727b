"""Mixer and feed-forward behind their norms and beside their residuals."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rat.config import MixerName
from rat.layers import Block, FeedForward


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@torch.no_grad()
def test_a_block_is_mixer_then_feed_forward(
    make_mixer: Callable, stir: Callable[[nn.Module], None], name: MixerName, assert_close: Callable
) -> None:
    block = Block(make_mixer(name), norm_eps=1e-2)
    stir(block)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    for documents in (None, ids):
        mixed = x + block.mixer(normed(x, block.mixer_norm.weight, 1e-2), documents)
        wide = gelu(normed(mixed, block.feed_forward_norm.weight, 1e-2) @ block.feed_forward.fc1.weight.T)
        assert_close(block(x, documents), mixed + wide @ block.feed_forward.fc2.weight.T)
    assert not torch.allclose(block(x), block(x, ids))


@torch.no_grad()
def test_steps_of_a_block_equal_its_full_pass(
    make_mixer: Callable, stir: Callable[[nn.Module], None], name: MixerName, assert_close: Callable
) -> None:
    block = Block(make_mixer(name), norm_eps=1e-6)
    stir(block)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    state = block.mixer.new_state(2)
    steps = [block.step(piece, state) for piece in x.split([5, 1, 3], dim=1)]
    assert_close(torch.cat(steps, dim=1), block(x))


def test_the_feed_forward_is_four_times_wider_without_biases(make_mixer: Callable, name: MixerName) -> None:
    feed_forward = FeedForward(16)
    shapes = {n: tuple(p.shape) for n, p in feed_forward.named_parameters()}
    assert shapes == {"fc1.weight": (64, 16), "fc2.weight": (16, 64)}
    assert feed_forward.flops_per_token() == 16 * 16**2
    mixer = make_mixer(name)
    assert Block(mixer, 1e-6).flops_per_token(50) == mixer.flops_per_token(50) + 16 * 16**2
