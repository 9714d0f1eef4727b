"""The RAT layer: a gated recurrence inside chunks, softmax attention over their ends (arXiv 2507.04416)."""

import torch
from torch import Tensor

from rat.layers.context_shard import ContextShard
from rat.layers.linear import Linear
from rat.layers.mixer import GatedMixer
from rat.layers.state import LayerState
from rat.ops import chunk_attention, chunk_attention_weights, chunk_decode, chunk_scan, output_gate, rotary
from rat.ops.backend import needs_gradient


class RAT(GatedMixer):
    """Between an RNN (chunk_size >= T) and attention (chunk_size 1).

    Args:
        d_model: D.
        num_heads: H.
        chunk_size: L, tokens in a chunk.
        num_groups: G, sets of queries and keys that the heads share (head h uses set h mod G).
        rope_base: base of the rotary positions, counted in chunks; None for no positions.
    """

    def __init__(self, d_model: int, num_heads: int, chunk_size: int, num_groups: int, rope_base: float | None) -> None:
        super().__init__(d_model, num_heads, gate_span=chunk_size)
        if num_heads % num_groups:
            raise ValueError(f"num_heads {num_heads} is not divisible by num_groups {num_groups}")
        self.chunk_size = chunk_size
        self.recurrent_elements = 2 * d_model
        self.num_groups = num_groups
        self.rope_base = rope_base
        d_group = num_groups * self.d_head
        self.widths = [d_model, d_model, d_model, d_group, d_group]
        self.in_proj = Linear(d_model, sum(self.widths))
        self.out_proj = Linear(d_model, d_model)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """See `Mixer.forward`. A shard begins with a chunk, so that only attention looks beyond it."""
        if shard is not None:
            shard.check(x, document_ids)
        z, v, gate_logits, q, k = self._project(x)
        self.watch(gate_logits)
        (v, k), _ = chunk_scan(
            gate_logits,
            (v, k),
            gate_bias=self.own_gate_bias(),
            chunk_size=self.chunk_size,
            document_ids=document_ids,
        )
        k, v = self.heads(k), self.heads(v)
        mixed = chunk_attention(
            self.heads(q),
            k,
            v,
            chunk_size=self.chunk_size,
            rope_base=self.rope_base,
            offset=None if shard is None else torch.full((len(x),), shard.start, device=x.device),
            ends=None if shard is None else self._ends(k, v, shard),
            document_ids=document_ids,
        )
        return self.out_proj(output_gate(z, mixed.flatten(-2)))

    def attention_weights(self, x: Tensor) -> Tensor:
        """What `forward` weighs the values at chunk ends and the token's own with, for x (B, T, D) without documents.

        Returns:
            (B, H, T, E + 1), see `rat.ops.chunk_attention_weights`.
        """
        _, _, gate_logits, q, k = self._project(x)
        (k,), _ = chunk_scan(gate_logits, (k,), gate_bias=self.own_gate_bias(), chunk_size=self.chunk_size)
        return chunk_attention_weights(
            self.heads(q), self.heads(k), chunk_size=self.chunk_size, rope_base=self.rope_base
        )

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Output gate, values, gate logits, queries and keys, (B, T, n * d) each."""
        return self.in_proj(x).split([width // self.num_ranks for width in self.widths], dim=-1)

    def _ends(self, k: Tensor, v: Tensor, shard: ContextShard) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values at the ends of all chunks up to this shard's last, (B, E, H, d) each."""
        chunks, last = shard.chunks(self.chunk_size), slice(self.chunk_size - 1, None, self.chunk_size)
        keys, values = k[:, last], v[:, last]
        if self.rope_base is not None and keys.shape[1]:
            index = torch.arange(chunks[shard.rank], chunks[shard.rank + 1], device=k.device)
            keys = rotary(keys, index, base=self.rope_base)
        own = torch.stack([keys, values], dim=2)
        keys, values = torch.cat([shard.before(own, chunks), own], dim=1).unbind(2)
        return keys, values

    def new_state(self, batch_size: int, max_length: int = 0) -> LayerState:
        """See `Mixer.new_state`: the chunk ends so far, and the recurrence inside the open chunk (fp32)."""
        device, dtype = self.gate_bias.device, self.state_dtype()
        heads = self.num_heads // self.num_ranks
        ends = (batch_size, heads, -(-max_length // self.chunk_size), self.d_head)
        return LayerState.empty(
            batch_size,
            device,
            end_keys=torch.zeros(ends, device=device, dtype=dtype),
            end_values=torch.zeros(ends, device=device, dtype=dtype),
            key=torch.zeros(batch_size, heads * self.d_head, device=device, dtype=torch.float32),
            value=torch.zeros(batch_size, heads * self.d_head, device=device, dtype=torch.float32),
        )

    def step(self, x: Tensor, state: LayerState, lengths: Tensor | None = None) -> Tensor:
        """See `Mixer.step`. One token for every row, with no gradient to keep, takes the short way."""
        z, v, gate_logits, q, k = self._project(x)
        if x.shape[1] == 1 and lengths is None and not needs_gradient(v, self.gate_bias, *state.tensors.values()):
            mixed = self._decode(v, gate_logits, q, k, state)
        else:
            mixed = self._extend(v, gate_logits, q, k, state, lengths)
        state.advance(x.shape[1], lengths)
        return self.out_proj(output_gate(z, mixed.flatten(-2)))

    def _decode(self, v: Tensor, gate_logits: Tensor, q: Tensor, k: Tensor, state: LayerState) -> Tensor:
        """The heads' outputs (B, 1, H, d) for one token of every row; the state but for its lengths."""
        state.reserve(state.longest // self.chunk_size + 1, "end_keys", "end_values")
        mixed = chunk_decode(
            gate_logits[:, 0],
            self.heads(q[:, 0]),
            k[:, 0],
            v[:, 0],
            gate_bias=self.own_gate_bias(),
            value_state=state.tensors["value"],
            key_state=state.tensors["key"],
            end_keys=state.tensors["end_keys"],
            end_values=state.tensors["end_values"],
            lengths=state.lengths,
            longest=state.longest,
            chunk_size=self.chunk_size,
            rope_base=self.rope_base,
        )
        return mixed[:, None]

    def _extend(
        self, v: Tensor, gate_logits: Tensor, q: Tensor, k: Tensor, state: LayerState, lengths: Tensor | None
    ) -> Tensor:
        """The heads' outputs (B, T, H, d) for any number of tokens; the state but for its lengths."""
        begun = state.longest > 0
        (v, k), (state.tensors["value"], state.tensors["key"]) = chunk_scan(
            gate_logits,
            (v, k),
            gate_bias=self.own_gate_bias(),
            chunk_size=self.chunk_size,
            initial_state=(state.tensors["value"], state.tensors["key"]) if begun else None,
            offset=state.lengths if begun else None,
            lengths=lengths,
        )
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        self._write_ends(k, v, state, lengths)
        seen = -(-(state.longest + q.shape[1]) // self.chunk_size)
        ends = tuple(state.tensors[n][:, :, :seen].transpose(1, 2).to(k.dtype) for n in ("end_keys", "end_values"))
        return chunk_attention(
            q,
            k,
            v,
            chunk_size=self.chunk_size,
            rope_base=self.rope_base,
            offset=state.lengths if begun else None,
            ends=(ends[0], ends[1]) if begun else None,
        )

    def _write_ends(self, k: Tensor, v: Tensor, state: LayerState, lengths: Tensor | None) -> None:
        """Put the latest token of each chunk touched in the chunk's slot, (B, T, H, d) -> (B, H, E, d).

        The slot of an open chunk is overwritten until the chunk closes; nobody sees it before.
        """
        length, size = k.shape[1], self.chunk_size
        touched, last = (length + size - 2) // size + 1, (state.longest + length - 1) // size
        state.reserve(last + 1, "end_keys", "end_values")
        slot = ((state.lengths // size)[:, None] + torch.arange(touched, device=k.device)).clamp(max=last)
        own = length if lengths is None else lengths[:, None]
        token = torch.minimum((slot + 1) * size - state.lengths[:, None], torch.as_tensor(own)).clamp(1) - 1
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        keys = k[rows, token]
        if self.rope_base is not None:
            keys = rotary(keys, slot, base=self.rope_base)
        state.tensors["end_keys"][rows, :, slot] = keys.to(state.tensors["end_keys"].dtype)
        state.tensors["end_values"][rows, :, slot] = v[rows, token].to(state.tensors["end_values"].dtype)

    def _can_crop(self, before: Tensor, after: Tensor) -> Tensor:
        return after % self.chunk_size == 0  # where the recurrence is emptied anyway

    def flops_per_token(self, seq_len: int) -> int:
        """See `Mixer.flops_per_token`: 2 (4D + 2Gd) D + 2 (T / L) D; causal halves are counted."""
        return 2 * (sum(self.widths) + self.d_model) * self.d_model + 2 * seq_len * self.d_model // self.chunk_size

    def sent_bytes(self, shard: ContextShard, bytes_per_element: int) -> int:
        """See `Mixer.sent_bytes`: a chunk's end, 2D, to each later rank."""
        return 2 * self.d_model * bytes_per_element * shard.sent(shard.chunks(self.chunk_size))

    def cache_elements(self, seq_len: int) -> int:
        """See `Mixer.cache_elements`: 2 ceil(T / L) D + 2D."""
        return 2 * -(-seq_len // self.chunk_size) * self.d_model + 2 * self.d_model
