"""Softmax attention over the whole past, and over a sliding window of it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from rat.layers.context_shard import ContextShard
from rat.layers.linear import Linear
from rat.layers.mixer import Mixer
from rat.layers.state import LayerState
from rat.ops import rotary, sliding_window_attention


class Attention(Mixer):
    """Causal multi-head attention with rotary positions counted in tokens.

    Args:
        d_model: D.
        num_heads: H.
        rope_base: base of the rotary positions; None for no positions.
    """

    window_size: int | None = None

    def __init__(self, d_model: int, num_heads: int, rope_base: float | None) -> None:
        super().__init__(d_model, num_heads)
        self.rope_base = rope_base
        self.in_proj = Linear(d_model, 3 * d_model)
        self.out_proj = Linear(d_model, d_model)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values, (B, T, H, d) each."""
        v, q, k = (self.heads(y) for y in self.in_proj(x).chunk(3, dim=-1))
        if self.rope_base is not None:
            q, k = (rotary(y, positions, base=self.rope_base) for y in (q, k))
        return q, k, v

    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """See `Mixer.forward`. Rotary scores depend on distances alone, so packed rows need no other positions."""
        positions = torch.arange(x.shape[1], device=x.device)
        if shard is None:
            q, k, v = self._project(x, positions)
            mixed = sliding_window_attention(q, k, v, window_size=self.window_size, document_ids=document_ids)
        else:
            shard.check(x, document_ids)
            q, k, v = self._project(x, positions + shard.start)
            own = torch.stack([k, v], dim=2)
            seen = torch.cat([shard.before(own, shard.borders, self.window_size), own], dim=1)
            mixed = self._attend_last(q, *seen.unbind(2))
        return self.out_proj(mixed.flatten(-2))

    def _attend_last(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B, T, H, d) of the last T of N tokens against the keys and values (B, N, H, d) of all."""
        bias = causal_lower_right(q.shape[1], keys.shape[1])
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)

    def new_state(self, batch_size: int, max_length: int = 0) -> LayerState:
        """See `Mixer.new_state`: every key and value, at the slot of its position."""
        weight, dtype = self.in_proj.weight, self.state_dtype()
        shape = (batch_size, self.num_heads // self.num_ranks, self._slots(max_length), self.d_head)
        cache = {n: torch.zeros(shape, device=weight.device, dtype=dtype) for n in ("keys", "values")}
        return LayerState.empty(batch_size, weight.device, **cache)

    def _slots(self, max_length: int) -> int:
        return max_length

    def step(self, x: Tensor, state: LayerState, lengths: Tensor | None = None) -> Tensor:
        """See `Mixer.step`."""
        length = x.shape[1]
        positions = state.lengths[:, None] + torch.arange(length, device=x.device)
        q, k, v = self._project(x, positions)
        if state.longest == 0:
            mixed = sliding_window_attention(q, k, v, window_size=self.window_size)
            self._remember(k, v, state, lengths)
        else:
            mixed = self._look_back(q, k, v, positions, state, lengths)
        state.advance(length, lengths)
        return self.out_proj(mixed.flatten(-2))

    def _remember(self, k: Tensor, v: Tensor, state: LayerState, lengths: Tensor | None) -> None:
        """Write keys and values to their slots; padding lands beyond the row's end, where it is not seen."""
        state.reserve(state.longest + k.shape[1], "keys", "values")
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = state.lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        for name, y in (("keys", k), ("values", v)):
            state.tensors[name][rows, :, slots] = y.to(state.tensors[name].dtype)

    def _look_back(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: LayerState, lengths: Tensor | None
    ) -> Tensor:
        self._remember(k, v, state, lengths)
        filled = state.longest + q.shape[1]
        keys, values = (state.tensors[name][:, :, :filled] for name in ("keys", "values"))
        seen = torch.arange(filled, device=q.device) <= positions[:, :, None]
        return _masked(q, keys, values, seen)

    def _can_crop(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.ones_like(after, dtype=torch.bool)

    def flops_per_token(self, seq_len: int) -> int:
        """See `Mixer.flops_per_token`: 8 D^2 + 2 T D; causal halves are counted."""
        return 8 * self.d_model**2 + 2 * seq_len * self.d_model

    def sent_bytes(self, shard: ContextShard, bytes_per_element: int) -> int:
        """See `Mixer.sent_bytes`: a token's key and value, 2D, to each later rank whose window reaches it."""
        return 2 * self.d_model * bytes_per_element * shard.sent(shard.borders, self.window_size)

    def cache_elements(self, seq_len: int) -> int:
        """See `Mixer.cache_elements`: 2 T D."""
        return 2 * seq_len * self.d_model


class SlidingWindowAttention(Attention):
    """Attention in which a token sees itself and the `window_size` tokens before it.

    Args:
        d_model: D.
        num_heads: H.
        window_size: W; W + 1 keys are seen.
        rope_base: base of the rotary positions; None for no positions.
    """

    window_size: int

    def __init__(self, d_model: int, num_heads: int, window_size: int, rope_base: float | None) -> None:
        super().__init__(d_model, num_heads, rope_base)
        self.window_size = window_size

    def _attend_last(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As in `Attention`. Tokens of earlier ranks, at most W, ask in vain, so that all shapes are alike."""
        earlier = keys.shape[1] - q.shape[1]
        q = F.pad(q, (0, 0, 0, 0, earlier, 0))
        return sliding_window_attention(q, keys, values, window_size=self.window_size)[:, earlier:]

    def _slots(self, max_length: int) -> int:
        return self.window_size + 1

    def _remember(self, k: Tensor, v: Tensor, state: LayerState, lengths: Tensor | None) -> None:
        """Keep the last W + 1 tokens in a ring: position p at slot p mod (W + 1)."""
        new = (k.shape[1] if lengths is None else lengths) + state.lengths
        token = self._ring_positions(new) - state.lengths[:, None]
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for name, y in (("keys", k), ("values", v)):
            old = state.tensors[name]
            fresh = y[rows, token.clamp(min=0)].transpose(1, 2).to(old.dtype)
            state.tensors[name] = torch.where((token >= 0)[:, None, :, None], fresh, old)

    def _ring_positions(self, lengths: Tensor) -> Tensor:
        """The position that stands in each slot of rows of the given lengths, negative where none does yet."""
        size = self.window_size + 1
        last = lengths[:, None] - 1
        return last - (last - torch.arange(size, device=lengths.device)) % size

    def _look_back(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: LayerState, lengths: Tensor | None
    ) -> Tensor:
        if q.shape[1] == 1 and lengths is None:
            return self._look_back_from_one(q, k, v, state)
        in_ring = self._ring_positions(state.lengths)
        keys, values = (
            torch.cat([state.tensors[name], y.transpose(1, 2).to(state.tensors[name].dtype)], dim=2)
            for name, y in (("keys", k), ("values", v))
        )
        distance = positions[:, :, None] - torch.cat([in_ring, positions], dim=1)[:, None]
        known = torch.cat([in_ring >= 0, torch.ones_like(positions, dtype=torch.bool)], dim=1)
        mixed = _masked(q, keys, values, known[:, None] & (distance >= 0) & (distance <= self.window_size))
        self._remember(k, v, state, lengths)
        return mixed

    def _look_back_from_one(self, q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> Tensor:
        """One token of every row takes the slot of the token that leaves its window; then it sees the whole ring."""
        rows = torch.arange(k.shape[0], device=k.device)
        slot = state.lengths % (self.window_size + 1)
        for name, y in (("keys", k), ("values", v)):
            state.tensors[name][rows, :, slot] = y[:, 0].to(state.tensors[name].dtype)
        known = self._ring_positions(state.lengths + 1) >= 0
        return _masked(q, state.tensors["keys"], state.tensors["values"], known[:, None])

    def _can_crop(self, before: Tensor, after: Tensor) -> Tensor:
        return (before <= self.window_size + 1) | (after == before - 1)

    def flops_per_token(self, seq_len: int) -> int:
        """See `Mixer.flops_per_token`: 8 D^2 + 4 W D, and never more than attention's."""
        return min(super().flops_per_token(seq_len), 8 * self.d_model**2 + 4 * self.window_size * self.d_model)

    def cache_elements(self, seq_len: int) -> int:
        """See `Mixer.cache_elements`: 2 (W + 1) D."""
        return 2 * (self.window_size + 1) * self.d_model


def _masked(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Queries (B, T, H, d) against a cache (B, H, N, d) under a mask (B, T, N)."""
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen[:, None])
    return out.transpose(1, 2)
