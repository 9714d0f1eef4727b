"""A layer of the backbone: mixer, then feed-forward, each behind a norm and beside a residual."""

from torch import Tensor, nn

from rat.layers.context_shard import ContextShard
from rat.layers.feed_forward import FeedForward
from rat.layers.mixer import Mixer
from rat.layers.state import LayerState


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
        mixer: any `Mixer` of width D.
        norm_eps: of both RMSNorms.
    """

    def __init__(self, mixer: Mixer, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(mixer.d_model, eps=norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = nn.RMSNorm(mixer.d_model, eps=norm_eps)
        self.feed_forward = FeedForward(mixer.d_model)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """A full pass, (B, T, D) -> (B, T, D); see `Mixer.forward`."""
        x = x + self.mixer(self.mixer_norm(x), document_ids, shard)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def step(self, x: Tensor, state: LayerState, lengths: Tensor | None = None) -> Tensor:
        """`Mixer.step` with everything around it."""
        x = x + self.mixer.step(self.mixer_norm(x), state, lengths)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token in a row of `seq_len`."""
        return self.mixer.flops_per_token(seq_len) + self.feed_forward.flops_per_token()
