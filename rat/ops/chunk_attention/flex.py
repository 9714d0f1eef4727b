"""Chunk attention on PyTorch's FlexAttention: a span of the chunk ends, then the token's own term.

The own term is one more logit of the same softmax. With the log-sum-exp of the ends' logits and the own logit s, the
whole is the mean of the ends' output and the own value, weighted by sigmoid(s - lse) for the latter.
"""

import torch
from torch import Tensor

from rat.ops.backend import check_flex
from rat.ops.chunk_attention.ends import Ends, regular_ends
from rat.ops.rotary.portable import rotary
from rat.ops.spans import compiled_on_gpus, span_attention


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Ends | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """As the reference; on a CPU without gradients."""
    check_flex(q, k, v, *(ends or ()))
    if ends is None:
        ends = regular_ends(k, v, chunk, chunk_size, rope_base, "portable")
    if not ends.keys.shape[1]:
        return v.clone()
    turned = q if rope_base is None else rotary(q, chunk, rope_base)
    return _attend(q, turned, k, v, *ends)


@compiled_on_gpus
def _attend(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, first: Tensor, last: Tensor
) -> Tensor:
    turned, q = (x.repeat(1, 1, k.shape[2] // q.shape[2], 1).view(k.shape) for x in (turned, q))
    out, lse = span_attention(turned, keys, values, first, last)
    wide = torch.promote_types(q.dtype, torch.float32)
    # A token and its own key turn by the same angle, which their product does not see.
    own = (q.to(wide) * k).sum(-1) * q.shape[-1] ** -0.5
    weight = torch.sigmoid(own - lse)[..., None]
    return torch.lerp(out.to(wide), v.to(wide), weight.to(wide)).to(v.dtype)
