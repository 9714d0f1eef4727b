"""The contenders without the identity compute the very same layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rat.benchmarks.masked import MaskedRAT, ScoresRAT, SdpaRAT
from rat.layers import RAT

SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 4, "num_groups": 2}


@pytest.mark.parametrize("kind", [ScoresRAT, SdpaRAT])
@pytest.mark.parametrize(("length", "chunk_size"), [(12, 4), (15, 4), (3, 4), (6, 1), (9, 9)])
@pytest.mark.parametrize("rope_base", [10000.0, None])
def test_the_masked_layer_is_rat_forward_and_backward(
    kind: type[MaskedRAT],
    length: int,
    chunk_size: int,
    rope_base: float | None,
    stir: Callable[[nn.Module], None],
    assert_close: Callable[..., None],
) -> None:
    rat, masked = (make(**SIZES, chunk_size=chunk_size, rope_base=rope_base).double() for make in (RAT, kind))
    stir(rat)
    masked.load_state_dict(rat.state_dict())
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, length, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def outcome(layer: RAT) -> dict[str, Tensor]:
        start = x.clone().requires_grad_()
        out = layer(start)
        wanted = {"x": start, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(out, list(wanted.values()), grad)
        return {"output": out, **{f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}}

    expected = outcome(rat)
    for name, value in outcome(masked).items():
        assert_close(value, expected[name], 1e-6, name)  # the scan keeps its state in fp32


def test_documents_are_refused() -> None:
    layer = ScoresRAT(**SIZES, chunk_size=4, rope_base=None)
    with pytest.raises(ValueError, match="no document_ids"):
        layer(torch.zeros(1, 4, 16), torch.zeros(1, 4, dtype=torch.long))


def test_the_workspace_grows_with_the_pairs() -> None:
    scores, sdpa = (kind(**SIZES, chunk_size=4, rope_base=None) for kind in (ScoresRAT, SdpaRAT))
    assert scores.workspace_bytes(2, 8, train=True) == 6 * 4 * (2 * 4) * 8 * 3
    assert scores.workspace_bytes(2, 8, train=False) < scores.workspace_bytes(2, 8, train=True)
    assert sdpa.workspace_bytes(2, 8, train=True) == 8 * (2 + 8) * (3 + 2 * 4)
