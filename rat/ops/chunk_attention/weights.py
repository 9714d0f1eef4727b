"""How much each token attends to which chunk end, for whoever wants to see it. No model runs through here."""

import torch
from torch import Tensor

from rat.ops.rotary import rotary


def chunk_attention_weights(q: Tensor, k: Tensor, *, chunk_size: int, rope_base: float | None = None) -> Tensor:
    """The softmax weights that `chunk_attention` gives to the values, of rows that hold one document from its start.

    Args:
        q: (B, T, G, d) queries, G dividing H.
        k: (B, T, H, d) keys after the recurrence, not rotated.
        chunk_size: L.
        rope_base: of the rotary positions; None for none.

    Returns:
        (B, H, T, E + 1), fp32 or wider, a sum of 1 over the last axis: the weights of the T // L = E chunk ends, 0
        where a token does not see one, and last that of the token itself.
    """
    length, heads, width = k.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, own = q.to(wide).repeat(1, 1, heads // q.shape[2], 1), k.to(wide)
    chunk = torch.arange(length, device=k.device) // chunk_size
    if rope_base is not None:
        queries, own = (rotary(x, chunk, base=rope_base) for x in (queries, own))
    last = slice(chunk_size - 1, None, chunk_size)
    ends, closed = own[:, last], chunk[last]
    to_ends = torch.einsum("bthd,behd->bhte", queries, ends)
    to_itself = torch.einsum("bthd,bthd->bht", queries, own)
    to_ends = to_ends.masked_fill(closed >= chunk[:, None], -torch.inf)
    return (torch.cat([to_ends, to_itself[..., None]], dim=-1) * width**-0.5).softmax(-1)
