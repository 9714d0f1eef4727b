"""The RAT layer as one would write it at first: inter-chunk attention under a mask.

Same weights and same result as `rat.layers.RAT`, without what makes that one fast: the observation that the queries of
a chunk see the same chunk ends, so that attention over them is grouped-query causal attention, which needs no mask and
half the products. These classes are contenders in benchmarks; nothing is trained with them.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from rat.layers import RAT, ContextShard
from rat.ops import chunk_scan, rotary


class MaskedRAT(RAT):
    """RAT whose full pass forms every pair of a token and a chunk end, also those that a mask then hides."""

    def forward(self, x: Tensor, document_ids: Tensor | None = None, shard: ContextShard | None = None) -> Tensor:
        """See `Mixer.forward`; a row is one document.

        Raises:
            ValueError: `document_ids` or a shard are given.
        """
        if document_ids is not None or shard is not None:
            raise ValueError(f"{type(self).__name__} is for benchmarks: it takes no document_ids and no shard")
        z, v, gate_logits, q, k = self.in_proj(x).split(self.widths, dim=-1)
        (v, k), _ = chunk_scan(gate_logits, (v, k), gate_bias=self.gate_bias, chunk_size=self.chunk_size)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        chunk = torch.arange(x.shape[1], device=x.device) // self.chunk_size
        if self.rope_base is not None:
            q, k = (rotary(y, chunk, base=self.rope_base) for y in (q, k))
        q = q.repeat(1, 1, self.num_heads // self.num_groups, 1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        ends = slice(self.chunk_size - 1, None, self.chunk_size)
        seen = torch.arange(k[:, :, ends].shape[2], device=x.device) < chunk[:, None]
        mixed = self.attend(q, k, v, k[:, :, ends], v[:, :, ends], seen)
        return self.out_proj(torch.sigmoid(z) * mixed.transpose(1, 2).flatten(-2))

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, end_keys: Tensor, end_values: Tensor, seen: Tensor) -> Tensor:
        """One softmax over the ends (B, H, E, d) that are `seen` (T, E) and each token's own term; all (B, H, T, d)."""

    @abstractmethod
    def workspace_bytes(self, batch_size: int, seq_len: int, train: bool) -> int:
        """Memory that the pairs of tokens and keys need, beyond what grows with T alone; with a backward or without."""


class ScoresRAT(MaskedRAT):
    """The scores written out: (T x E) of them under a mask, the own term in one more column."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, end_keys: Tensor, end_values: Tensor, seen: Tensor) -> Tensor:
        """See `MaskedRAT.attend`."""
        scores = (q @ end_keys.mT).masked_fill(~seen, -torch.inf)
        own = (q * k).sum(-1, keepdim=True)
        weights = (torch.cat([scores, own], dim=-1) * self.d_head**-0.5).softmax(-1)
        return weights[..., :-1] @ end_values + weights[..., -1:] * v

    def workspace_bytes(self, batch_size: int, seq_len: int, train: bool) -> int:
        """See `MaskedRAT.workspace_bytes`: a few copies of the scores."""
        pairs = batch_size * self.num_heads * seq_len * (seq_len // self.chunk_size + 1)
        return (6 if train else 4) * pairs * self.in_proj.weight.element_size()


class SdpaRAT(MaskedRAT):
    """One call of PyTorch's attention on chunk ends and own tokens side by side, under a (T x (E + T)) mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, end_keys: Tensor, end_values: Tensor, seen: Tensor) -> Tensor:
        """See `MaskedRAT.attend`."""
        mask = torch.cat([seen, torch.eye(q.shape[2], dtype=torch.bool, device=q.device)], dim=1)
        keys, values = torch.cat([end_keys, k], dim=2), torch.cat([end_values, v], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def workspace_bytes(self, batch_size: int, seq_len: int, train: bool) -> int:
        """See `MaskedRAT.workspace_bytes`: the mask, and its copy as numbers that PyTorch makes."""
        pairs = seq_len * (seq_len // self.chunk_size + seq_len)
        return pairs * (3 + 2 * self.in_proj.weight.element_size())
