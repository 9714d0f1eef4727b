"""The weights that are shown are those that the values are weighed with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.initialization import initialize
from rat.layers.rat import RAT
from rat.ops import chunk_attention, chunk_attention_weights, chunk_scan, output_gate

BASES = pytest.mark.parametrize("rope_base", [None, 10.0])
LENGTHS = pytest.mark.parametrize(("chunk_size", "length"), [(1, 5), (4, 3), (4, 4), (4, 5), (4, 16), (3, 11), (9, 9)])


def weighed(weights: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Values (B, T, H, d) at the chunk ends and of each token itself, by their weights (B, H, T, E + 1)."""
    ends = v[:, chunk_size - 1 :: chunk_size]
    own = weights[..., -1].transpose(1, 2)[..., None] * v
    return torch.einsum("bhte,behd->bthd", weights[..., :-1], ends) + own


@BASES
@LENGTHS
def test_values_by_their_weights_are_the_attention(
    chunk_size: int, length: int, rope_base: float | None, draw: Callable[..., Tensor]
) -> None:
    q, k, v = (draw(i, 2, length, heads, 4) for i, heads in enumerate((2, 6, 6)))
    weights = chunk_attention_weights(q, k, chunk_size=chunk_size, rope_base=rope_base)
    assert weights.shape == (2, 6, length, length // chunk_size + 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, length).to(weights))
    expected = chunk_attention(q, k, v, chunk_size=chunk_size, rope_base=rope_base, backend="reference")
    torch.testing.assert_close(weighed(weights, v, chunk_size), expected)


def test_an_end_is_seen_from_the_next_chunk_on() -> None:
    zeros = torch.zeros(1, 7, 1, 2)
    weights = chunk_attention_weights(zeros, zeros, chunk_size=2)[0, 0]
    itself, one, two, three = [0, 0, 0, 1], [1 / 2, 0, 0, 1 / 2], [1 / 3, 1 / 3, 0, 1 / 3], [1 / 4] * 4
    torch.testing.assert_close(weights, torch.tensor([itself, itself, one, one, two, two, three]))


@BASES
def test_a_layer_shows_the_weights_of_its_forward_pass(rope_base: float | None) -> None:
    torch.manual_seed(0)
    layer = RAT(16, num_heads=4, chunk_size=4, num_groups=2, rope_base=rope_base)
    initialize(layer, init_std=1.0)
    x = torch.randn(2, 11, 16)
    with torch.no_grad():
        z, v, gate_logits, _, _ = layer.in_proj(x).split(layer.widths, dim=-1)
        (v,), _ = chunk_scan(gate_logits, (v,), gate_bias=layer.gate_bias, chunk_size=4)
        mixed = weighed(layer.attention_weights(x), layer.heads(v), 4)
        torch.testing.assert_close(layer.out_proj(output_gate(z, mixed.flatten(-2))), layer(x))
