"""Attention over the ends of earlier chunks and the token itself, one token at a time (RAT eq. 3-4)."""

import torch
from torch import Tensor

from rat.ops.chunk_attention.ends import Ends, regular_ends
from rat.ops.rotary import reference as rope


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Ends | None,
    chunk: Tensor,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """Softmax over q_t . k_j for the chunk ends j that t may see and for t itself, times their values.

    `chunk` (B, T) is the index of each token's chunk in its document. Without `ends` every row holds one document from
    its first token on. Other shapes as in the public function.
    """
    if ends is None:
        ends = regular_ends(k, v, chunk, chunk_size, rope_base, "reference")
    batch, length, heads, width = k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).repeat(1, 1, heads // q.shape[2], 1)
    keys = k.to(wide)
    if rope_base is not None:
        queries, keys = (rope.rotary(x, chunk, rope_base) for x in (queries, keys))
    rows = []
    for b in range(batch):
        for t in range(length):
            seen = slice(int(ends.first[b, t]), int(ends.last[b, t]))
            all_keys = torch.cat([ends.keys[b, seen].to(wide), keys[b, t, None]])
            all_values = torch.cat([ends.values[b, seen], v[b, t, None]]).to(wide)
            logits = torch.einsum("hd,nhd->hn", queries[b, t], all_keys) * width**-0.5
            rows.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), all_values))
    return torch.stack(rows).view(batch, length, heads, width).to(v.dtype)
