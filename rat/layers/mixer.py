"""The protocol of a mixer: what a block asks of RAT, attention, sliding-window attention and the RNN."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rat.layers.context_shard import ContextShard
from rat.layers.linear import Linear
from rat.layers.state import LayerState


class Mixer(nn.Module, ABC):
    """Mixes information along the sequence: (B, T, D) -> (B, T, D), without norm or residual."""

    in_proj: Linear
    out_proj: Linear
    # Of `cache_elements`, those of a recurrence, which are fp32 whatever the rest is.
    recurrent_elements = 0
    # Over which `rat.tensor_parallel` has dealt out the heads. All other numbers here are the whole layer's.
    num_ranks = 1

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}")
        self.d_model = d_model
        self.num_heads = num_heads
        self.d_head = d_model // num_heads

    @abstractmethod
    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """A full pass over rows that start at their first token; `document_ids` (B, T) tells packed ones apart.

        With `shard`, x holds only this rank's tokens of every row (no documents then).

        Raises:
            ValueError: x is no such part, or documents are given with it.
        """

    @abstractmethod
    def new_state(self, batch_size: int, max_length: int = 0) -> LayerState:
        """An empty decoding state with room for `max_length` tokens; it grows when more come."""

    @abstractmethod
    def step(self, x: Tensor, state: LayerState, lengths: Tensor | None = None) -> Tensor:
        """Mix T >= 1 further tokens and advance the state in place.

        Args:
            x: (B, T, D).
            state: what the rows have seen so far, each at its own length.
            lengths: (B,) how many of the T tokens are a row's own; the rest is padding on the right, whose
                outputs are meaningless and which leaves no trace.
        """

    def crop(self, state: LayerState, lengths: Tensor) -> None:
        """Let every row forget what it has seen behind its first `lengths` (B,) tokens; in place.

        Raises:
            ValueError: as `check_crop`.
        """
        self.check_crop(state, lengths)
        state.lengths, state.longest = lengths.clone(), int(lengths.max())

    def check_crop(self, state: LayerState, lengths: Tensor) -> None:
        """Raise ValueError if a row is shorter than that, or its mixer cannot go back so far.

        Attention always can; RAT to the end of any chunk; a sliding window as long as no token has left it, else by
        one; a recurrence to 0.
        """
        if lengths.shape != state.lengths.shape or ((lengths < 0) | (lengths > state.lengths)).any():
            raise ValueError(f"cannot crop rows of {state.lengths.tolist()} tokens to {lengths.tolist()}")
        kept = (lengths == state.lengths) | self._can_crop(state.lengths, lengths)
        if not kept.all():
            row = int((~kept).nonzero()[0])
            raise ValueError(
                f"{type(self).__name__} cannot go back from {int(state.lengths[row])} to {int(lengths[row])} tokens"
                f" (row {row}): keep a copy of the state (`select`) instead"
            )

    @abstractmethod
    def _can_crop(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether rows (B,) of so many tokens can become so much shorter; (B,) bool."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token in a row of `seq_len`, a multiply-add counted as 2."""

    @abstractmethod
    def cache_elements(self, seq_len: int) -> int:
        """Numbers that the decoding state of one row of `seq_len` tokens holds."""

    @abstractmethod
    def sent_bytes(self, shard: ContextShard, bytes_per_element: int) -> int:
        """Bytes that the ranks of a shard together send in a forward pass of one row; backward as many again."""

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, n * d) -> (B, T, n, d)."""
        return x.unflatten(-1, (-1, self.d_head))

    def state_dtype(self) -> torch.dtype:
        """The dtype in which keys and values arrive: autocast's, where it is on, else the weights'."""
        device = self.in_proj.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.in_proj.weight.dtype


class GatedMixer(Mixer):
    """A mixer with a recurrence: a gate with a bias that starts as log U(1, span - 1)."""

    def __init__(self, d_model: int, num_heads: int, gate_span: int) -> None:
        super().__init__(d_model, num_heads)
        self.gate_span = gate_span
        self.gate_bias = nn.Parameter(torch.empty(d_model))
        # The logits of the last full pass, bias included, for whoever watches the gates (a callback sets `watched`).
        self.watched = False
        self.gate_logits: Tensor | None = None

    def own_gate_bias(self) -> Tensor:
        """The bias of the channels of this rank's heads, (D,) where they are not dealt out."""
        bias = self.gate_bias
        return bias.to_local().flatten() if self.num_ranks > 1 and isinstance(bias, DTensor) else bias

    def watch(self, gate_logits: Tensor) -> None:
        """Keep this pass's gate logits (B, T, D) where someone asked for them; with the bias, which may be sharded
        among processes and whole during the pass alone. Where heads are dealt out, those of this rank's."""
        self.gate_logits = (gate_logits.float() + self.own_gate_bias().float()).detach() if self.watched else None

    def memory_length(self) -> Tensor:
        """1 / (1 - g) of the watched pass, in tokens, (B, T, D) fp32: how far back the gates remember."""
        if self.gate_logits is None:
            raise RuntimeError("no gates were watched: set `watched` and run a full pass first")
        # 1 / (1 - sigmoid(x)) = 1 + exp(x)
        return 1 + torch.exp(self.gate_logits)
