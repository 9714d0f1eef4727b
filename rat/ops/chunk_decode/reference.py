"""One token of the RAT layer for each row, one row at a time (RAT eq. 1-4, arXiv 2507.04416)."""

import torch
from torch import Tensor

from rat.ops.rotary import reference as rope


def chunk_decode(
    gate_logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    value_state: Tensor,
    key_state: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    gate_bias: Tensor | None,
    lengths: Tensor,
    longest: int,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """s = g * s + (1 - g) * y, then softmax over q . k of the earlier chunk ends and of the token itself.

    Shapes as in the public function; the states and the two caches are written in place.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    gate = torch.sigmoid(gate_logits.to(wide) + (0 if gate_bias is None else gate_bias.to(wide)))
    heads, d_head = end_keys.shape[1], end_keys.shape[3]
    rows = []
    for b, length in enumerate(lengths.tolist()):
        chunk, place = divmod(length, chunk_size)
        for state, y in ((value_state, v), (key_state, k)):
            before = state[b].to(wide) if place else torch.zeros_like(gate[b])
            state[b] = gate[b] * before + (1 - gate[b]) * y[b].to(wide).tile(gate.shape[1] // y.shape[1])
        query = q[b].to(wide).tile(heads // q.shape[1], 1)
        key, value = (state[b].to(wide).view(heads, d_head) for state in (key_state, value_state))
        if rope_base is not None:
            query, key = (
                rope.rotary(x[None, None], lengths.new_tensor([chunk]), rope_base)[0, 0] for x in (query, key)
            )
        keys = torch.cat([end_keys[b, :, :chunk].to(wide), key[:, None]], dim=1)
        values = torch.cat([end_values[b, :, :chunk].to(wide), value[:, None]], dim=1)
        logits = torch.einsum("hd,hnd->hn", query, keys) * d_head**-0.5
        rows.append(torch.einsum("hn,hnd->hd", logits.softmax(-1), values))
        end_keys[b, :, chunk], end_values[b, :, chunk] = key, value
    return torch.stack(rows).to(v.dtype)
