"""The gated RNN: the recurrence of RAT over the whole sequence, with an output gate and no attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rat.layers.context_shard import ContextShard
from rat.layers.linear import Linear
from rat.layers.mixer import GatedMixer
from rat.layers.state import LayerState
from rat.ops import gated_scan, output_gate


class RNN(GatedMixer):
    """Gated linear recurrence; no positions.

    Args:
        d_model: D.
        num_heads: H; the recurrence is channel-wise, so it only has to divide D.
        max_seq_len: T of training; the gate's bias starts as log U(1, T - 1).
    """

    def __init__(self, d_model: int, num_heads: int, max_seq_len: int) -> None:
        super().__init__(d_model, num_heads, gate_span=max_seq_len)
        self.recurrent_elements = d_model
        self.in_proj = Linear(d_model, 3 * d_model)
        self.out_proj = Linear(d_model, d_model)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """See `Mixer.forward`."""
        z, v, gate_logits = self.in_proj(x).chunk(3, dim=-1)
        self.watch(gate_logits)
        arriving = None
        if shard is not None:
            shard.check(x, document_ids)
            arriving = (self._arriving(gate_logits, v, shard),)
        (v,), _ = gated_scan(
            gate_logits, (v,), gate_bias=self.own_gate_bias(), initial_state=arriving, document_ids=document_ids
        )
        return self.out_proj(output_gate(z, v))

    def _arriving(self, gate_logits: Tensor, v: Tensor, shard: ContextShard) -> Tensor:
        """The state (B, D) that the tokens before this shard leave.

        A shard turns the state s that arrives into kept * s + left, so ranks need not wait for each other: they scan
        from zero, exchange these two vectors, and scan again from what they add up to.
        """
        _, (left,) = gated_scan(gate_logits, (v,), gate_bias=self.own_gate_bias())
        kept = F.logsigmoid(gate_logits.to(left.dtype) + self.own_gate_bias()).sum(1).exp()
        earlier = shard.before(torch.stack([kept, left], dim=1)[:, None], range(shard.num_ranks + 1))
        state = earlier[:, :0].sum((1, 2))  # zero, and the first rank takes part in the backward all the same
        for rank in range(shard.rank):
            state = earlier[:, rank, 0] * state + earlier[:, rank, 1]
        return state

    def new_state(self, batch_size: int, max_length: int = 0) -> LayerState:
        """See `Mixer.new_state`: one vector a row, in fp32."""
        device = self.gate_bias.device
        value = torch.zeros(batch_size, self.d_model // self.num_ranks, device=device, dtype=torch.float32)
        return LayerState.empty(batch_size, device, value=value)

    def step(self, x: Tensor, state: LayerState, lengths: Tensor | None = None) -> Tensor:
        """See `Mixer.step`."""
        z, v, gate_logits = self.in_proj(x).chunk(3, dim=-1)
        (v,), (state.tensors["value"],) = gated_scan(
            gate_logits,
            (v,),
            gate_bias=self.own_gate_bias(),
            initial_state=(state.tensors["value"],),
            lengths=lengths,
        )
        state.advance(x.shape[1], lengths)
        return self.out_proj(output_gate(z, v))

    def crop(self, state: LayerState, lengths: Tensor) -> None:
        """See `Mixer.crop`."""
        super().crop(state, lengths)
        state.tensors["value"] = state.tensors["value"] * (lengths > 0)[:, None]

    def _can_crop(self, before: Tensor, after: Tensor) -> Tensor:
        return after == 0

    def flops_per_token(self, seq_len: int) -> int:
        """See `Mixer.flops_per_token`: 8 D^2."""
        return 8 * self.d_model**2

    def sent_bytes(self, shard: ContextShard, bytes_per_element: int) -> int:
        """See `Mixer.sent_bytes`: two vectors to each later rank, always fp32."""
        return 2 * self.d_model * 4 * shard.sent(range(shard.num_ranks + 1))

    def cache_elements(self, seq_len: int) -> int:
        """See `Mixer.cache_elements`: D."""
        return self.d_model
