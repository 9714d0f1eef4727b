"""A decoding step in PyTorch: a few operations on (B, D), and one pass over the caches as they lie.

The token's own key and value are written to the slot of its chunk first. Attention over the slots up to that one is
then all of it, own term included, and reading the caches, each number once, is what takes the time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rat.ops.rotary.portable import angles, turn

# Keys of so many numbers are widened at a time on a CPU: 2 MiB in fp32 are still in its cache when they are multiplied.
BLOCK = 1 << 19


@torch.library.custom_op("rat::chunk_decode", mutates_args=("value_state", "key_state", "end_keys", "end_values"))
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
    """As the reference."""
    heads, d_head = end_keys.shape[1], end_keys.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    chunk = lengths // chunk_size
    _advance(gate_logits, gate_bias, (v, k), (value_state, key_state), lengths % chunk_size == 0)
    queries = q.to(wide) * d_head**-0.5
    key, value = (state.unflatten(1, (heads, d_head)) for state in (key_state, value_state))
    if rope_base is not None:
        cos_sin = angles(chunk, d_head, rope_base, wide)
        queries, key = (turn(x, *cos_sin) for x in (queries, key))
    rows = torch.arange(len(v), device=v.device)
    end_keys[rows, :, chunk] = key.to(end_keys.dtype)
    end_values[rows, :, chunk] = value.to(end_values.dtype)
    slots = torch.arange(longest // chunk_size + 1, device=v.device)
    queries = queries.repeat(1, heads // q.shape[1], 1)
    scores = _scores(queries, end_keys[:, :, : len(slots)])
    scores.masked_fill_(slots > chunk[:, None, None], -torch.inf)
    return _mix(scores.softmax(-1), end_values, torch.minimum(slots, chunk[:, None])).to(v.dtype)


@chunk_decode.register_fake
def _(gate_logits: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1] // q.shape[2], q.shape[2])


def _advance(
    gate_logits: Tensor,
    gate_bias: Tensor | None,
    streams: tuple[Tensor, Tensor],
    states: tuple[Tensor, Tensor],
    restart: Tensor,
) -> None:
    """The recurrence, s = g s + (1 - g) y, in place; `restart` (B,) empties the state before."""
    wide = states[0].dtype
    logits = gate_logits.to(wide)
    gate = torch.sigmoid(logits if gate_bias is None else logits + gate_bias.to(wide))
    for y, state in zip(streams, states, strict=True):
        tiled = y.to(wide).repeat(1, state.shape[1] // y.shape[1])
        state.masked_fill_(restart[:, None], 0)
        torch.lerp(tiled, state, gate, out=state)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """q . k of (B, H, d) with (B, H, n, d), in the dtype of the queries: (B, H, n)."""
    batch, heads, slots, d_head = keys.shape
    keys = keys.flatten(0, 1)
    # A transposed row: a column that is contiguous itself goes to a routine four times slower.
    columns = queries.view(-1, 1, d_head).mT
    if keys.device.type != "cpu":  # where narrow numbers are multiplied at full speed and summed up in fp32
        columns = columns.to(keys.dtype)
    step = len(keys) if keys.dtype == columns.dtype else max(1, BLOCK // (slots * d_head))
    scores = columns.new_empty(len(keys), slots, 1)
    for block, column, out in zip(keys.split(step), columns.split(step), scores.split(step), strict=True):
        torch.bmm(block.to(columns.dtype), column, out=out)  # without `out` autocast would narrow it again
    return scores.view(batch, heads, slots).to(queries.dtype)


def _mix(weights: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Sum the values (B, H, E, d) of some slots (B, n) with the weights (B, H, n): (B, H, d).

    A bag of embeddings is this sum at twice the speed of a matrix product with one row, and needs no copy.
    """
    batch, heads, room, d_head = values.shape
    first = torch.arange(0, batch * heads * room, room, device=values.device).view(batch, heads, 1)
    index = (first + slots[:, None]).flatten(0, 1)
    weights = weights.to(values.dtype).flatten(0, 1)
    mixed = F.embedding_bag(index, values.reshape(-1, d_head), mode="sum", per_sample_weights=weights)
    return mixed.view(batch, heads, d_head)
