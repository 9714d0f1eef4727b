"""The language model: embedding, blocks, final norm, tied head. Architecture and nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rat.checkpoint import Pretrained
from rat.config import MixerName, ModelConfig
from rat.generation import Generator
from rat.initialization import initialize
from rat.layers import RAT, RNN, Attention, Block, ContextShard, LayerState, Mixer, SlidingWindowAttention
from rat.ops import linear

# The one place where a pattern's names meet their classes.
MIXERS: dict[MixerName, Callable[[ModelConfig], Mixer]] = {
    "rat": lambda c: RAT(c.d_model, c.num_heads, c.chunk_size, c.num_groups, c.rope_base),
    "attention": lambda c: Attention(c.d_model, c.num_heads, c.rope_base),
    "sliding_window": lambda c: SlidingWindowAttention(c.d_model, c.num_heads, c.window_size, c.rope_base),
    "rnn": lambda c: RNN(c.d_model, c.num_heads, c.max_seq_len),
}

IGNORED = -100
# Rows of logits that the loss holds at a time on a CPU, where the library's own choice is a quarter slower.
CPU_LOSS_ROWS = 256
# Logits that `score` holds at a time: 64 MiB in fp32.
SCORED_LOGITS = 2**24


class CausalLM(Pretrained, Generator):
    """A causal language model whose layers follow `config.pattern`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(Block(MIXERS[name](config), config.norm_eps) for name in config.layer_names())
        self.layers: Sequence[Block] = blocks  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        initialize(self, config.init_std)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> Tensor:
        """Logits, or the mean loss where `labels` are given.

        Args:
            input_ids: (B, T) int64, T >= 1.
            labels: (B, T) int64, the target of each position (shifted already); -100 is ignored.
            document_ids: (B, T); tokens of other documents are not seen.
            positions: (B, T) bool, where logits are wanted; not together with labels.
            shard: the part of every row that this rank holds; all else is that part then, the loss that of whole rows.

        Returns:
            (B, T, V) logits; (N, V) at the N chosen positions, row by row; or the cross-entropy in nats a token, a
            scalar, for which the logits are never stored whole. It is 0 where every label is ignored.
        """
        self._check(input_ids, labels, positions)
        x = self.hidden(input_ids, document_ids, shard)
        if labels is not None:
            return self.loss(x, labels, shard)
        return self.logits(x if positions is None else x[positions])

    def hidden(
        self, input_ids: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None
    ) -> Tensor:
        """(B, T, D) behind the last layer, before the final norm; the arguments are those of `forward`."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, document_ids, shard)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) of `hidden` or `advance` -> (..., V)."""
        return linear(self.norm(x), self.embedding.weight)

    def loss(self, x: Tensor, labels: Tensor, shard: ContextShard | None = None) -> Tensor:
        """The mean cross-entropy of `forward`, from (B, T, D) of `hidden`."""
        x = self.norm(x)
        counted = (labels != IGNORED).sum()
        total = F.linear_cross_entropy(
            x.flatten(0, 1),
            self.embedding.weight,
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=CPU_LOSS_ROWS if x.device.type == "cpu" else None),
        )
        if shard is not None:
            total, counted = shard.sum(total), shard.sum(counted)
        return total / counted.clamp(min=1)

    def _check(self, input_ids: Tensor, labels: Tensor | None = None, positions: Tensor | None = None) -> None:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (B, T) with B, T >= 1, got {tuple(input_ids.shape)}")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit input_ids {tuple(input_ids.shape)}")
        if positions is None:
            return
        if labels is not None:
            raise ValueError("labels give a loss, positions give logits: pass one of them")
        if positions.shape != input_ids.shape or positions.dtype != torch.bool:
            found = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"positions must be bool like input_ids {tuple(input_ids.shape)}, got {found}")

    def new_state(self, batch_size: int, max_length: int = 0) -> list[LayerState]:
        """An empty decoding state, a part for each layer, with room for `max_length` tokens a row."""
        return [layer.mixer.new_state(batch_size, max_length) for layer in self.layers]

    def step(self, input_ids: Tensor, state: list[LayerState], lengths: Tensor | None = None) -> Tensor:
        """Decode T >= 1 further tokens of every row and advance the state in place.

        Args:
            input_ids: (B, T) int64.
            state: of `new_state`; rows may stand at different lengths.
            lengths: (B,) from 0 to T, how many of the tokens are a row's own; the rest is padding on the right.

        Returns:
            (B, V) logits after each row's last token; meaningless for rows that bring none.
        """
        x = self.advance(input_ids, state, lengths)
        return self.logits(x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1])

    def score(
        self, input_ids: Tensor, targets: Tensor, state: list[LayerState], lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance the state as `step` does, and tell how likely each given next token was.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token after each position; -100 where that is not asked.
            state: of `new_state`; rows may stand at different lengths.
            lengths: (B,) as for `step`.

        Returns:
            (B, T) fp32 log-probabilities in nats, 0 where not asked, and (B, T) bool, whether the target is the
            likeliest token, True where not asked. Logits are made for a slice of the asked positions at a time.
        """
        if targets.shape != input_ids.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit input_ids {tuple(input_ids.shape)}")
        x = self.advance(input_ids, state, lengths)
        asked = targets != IGNORED
        likelihood = torch.zeros(targets.shape, device=x.device)
        likeliest = torch.ones_like(asked)
        if asked.any():
            rows = max(1, SCORED_LOGITS // self.config.vocab_size)
            parts = zip(x[asked].split(rows), targets[asked].split(rows), strict=True)
            pairs = [_compare(self.logits(part), target) for part, target in parts]
            likelihood[asked] = torch.cat([pair[0] for pair in pairs])
            likeliest[asked] = torch.cat([pair[1] for pair in pairs])
        return likelihood, likeliest

    def advance(self, input_ids: Tensor, state: list[LayerState], lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) behind the last layer, before the final norm; all else is as in `step`."""
        self._check(input_ids)
        rows = len(state[0].lengths)
        if rows != len(input_ids) or (lengths is not None and lengths.shape != (rows,)):
            given = "" if lengths is None else f", lengths {tuple(lengths.shape)}"
            raise ValueError(f"the state has {rows} rows, input_ids are {tuple(input_ids.shape)}{given}")
        x = self.embedding(input_ids)
        for layer, part in zip(self.layers, state, strict=True):
            x = layer.step(x, part, lengths)
        return x

    def crop(self, state: list[LayerState], lengths: Tensor) -> None:
        """Take every row of `state` back to its first `lengths` (B,) tokens, in place, or leave all as it is.

        Raises:
            ValueError: a layer cannot, see `Mixer.check_crop`.
        """
        for layer, part in zip(self.layers, state, strict=True):
            layer.mixer.check_crop(part, lengths)
        for layer, part in zip(self.layers, state, strict=True):
            layer.mixer.crop(part, lengths)

    def num_parameters(self) -> int:
        """Trained numbers; the head is the embedding and counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token in a row of `seq_len`, head included; a train step takes three times that."""
        head = 2 * self.embedding.weight.numel()
        return head + sum(layer.flops_per_token(seq_len) for layer in self.layers)

    def cache_bytes(self, seq_len: int, bytes_per_element: int = 2) -> int:
        """Bytes that the decoding state of one row of `seq_len` tokens needs; recurrences are always fp32."""
        mixers = [layer.mixer for layer in self.layers]
        wide = sum(mixer.recurrent_elements for mixer in mixers)
        return bytes_per_element * (sum(mixer.cache_elements(seq_len) for mixer in mixers) - wide) + 4 * wide


def _compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) logits and (N,) targets: the targets' log-probabilities in fp32, and whether they are the likeliest."""
    logits = logits.float()
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return chosen - logits.logsumexp(1), logits.argmax(1) == targets
