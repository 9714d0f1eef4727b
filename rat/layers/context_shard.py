"""Context parallelism: the tokens of a row dealt out over ranks, and what a rank needs of those before it.

Every mixer needs something of the past: RAT the ends of its chunks, attention all keys and values, a sliding window
the last W of them, the RNN one state. A rank hands its part of that to the later ranks that see it, and to nobody
else: one all-to-all with uneven parts, whose backward brings their gradients back the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives


@dataclass(frozen=True)
class ContextShard:
    """The run of tokens that this rank holds of every row, for `CausalLM.forward(..., shard=)`.

    Every rank of the group has to run the same passes, backward ones included. The loss is that of whole rows, on
    every rank; the gradients **averaged** over the ranks are its gradients, so that DDP and FSDP need no change.

    Attributes:
        borders: the position at which each rank's tokens begin, and the length of the rows: R + 1 numbers.
        rank: of this process in the group.
        group: the process group; None for all processes.

    Example, for `torchrun --nproc-per-node 2 train.py` (on GPUs with backend "nccl")::

        import torch
        from torch import distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from rat import CausalLM, ContextShard, ModelConfig

        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = CausalLM(ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, chunk_size=4))
        replica = DistributedDataParallel(model)
        tokens = torch.randint(64, (2, 31))  # the same on every rank
        input_ids, labels = tokens[:, :-1], tokens[:, 1:]

        shard = ContextShard.of(input_ids.shape[1], model.config.chunk_size)
        loss = replica(shard.part(input_ids), shard.part(labels), shard=shard)
        loss.backward()
    """

    borders: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, length: int, chunk_size: int, group: dist.ProcessGroup | None = None) -> Self:
        """This process's part of rows of `length` tokens.

        Args:
            length: T of the whole rows.
            chunk_size: L of the model's RAT layers; shards are whole chunks but for the row's last one. 1 where no
                layer is RAT.
            group: the ranks that share a row, in the order of its tokens.

        Raises:
            ValueError: see `deal`; or this process is not in the group.
        """
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not in the group that the rows are dealt out over")
        return cls(deal(length, chunk_size, dist.get_world_size(group)), rank, group)

    @property
    def start(self) -> int:
        """The position of this rank's first token."""
        return self.borders[self.rank]

    @property
    def length(self) -> int:
        """How many tokens of a row this rank holds."""
        return self.borders[self.rank + 1] - self.start

    @property
    def num_ranks(self) -> int:
        """R, the ranks that share a row."""
        return len(self.borders) - 1

    def check(self, x: Tensor, document_ids: Tensor | None) -> None:
        """Raise ValueError where x (B, T, ...) cannot be this rank's part, or documents are given."""
        if x.shape[1] != self.length:
            raise ValueError(f"this rank's shard is of {self.length} tokens, got {x.shape[1]}: see ContextShard.part")
        if document_ids is not None:
            raise ValueError(
                "document_ids do not go with a shard: chunks restart at every document, so that its borders would be"
                " none of theirs; leave document_ids out, or give each rank whole rows"
            )

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of whole rows, (B, T, ...) -> (B, `length`, ...)."""
        if x.ndim < 2 or x.shape[1] != self.borders[-1]:
            raise ValueError(f"the shard is one of rows of {self.borders[-1]} tokens, got {tuple(x.shape)}")
        return x[:, self.start : self.start + self.length]

    def chunks(self, chunk_size: int) -> list[int]:
        """`borders` in full chunks.

        Raises:
            ValueError: a rank would begin inside a chunk.
        """
        if any(border % chunk_size for border in self.borders[:-1]):
            raise ValueError(
                f"shards that begin at {list(self.borders[:-1])} cut chunks of {chunk_size}:"
                f" make them with ContextShard.of(length, {chunk_size})"
            )
        return [border // chunk_size for border in self.borders]

    def before(self, x: Tensor, borders: Sequence[int], window: int | None = None) -> Tensor:
        """What stands before this rank's entries; every rank has to ask.

        Args:
            x: (B, n, ...), this rank's entries.
            borders: how many entries stand before each rank's, and how many there are: R + 1 numbers.
            window: the most that a rank sees of those before it; None for all.

        Returns:
            (B, n', ...), none on the first rank. Its gradient goes to the ranks that the entries came from.
        """
        ranks = range(self.num_ranks)
        given = [handed_on(borders, self.rank, other, window) for other in ranks]
        taken = [handed_on(borders, other, self.rank, window) for other in ranks]
        x = x.transpose(0, 1)
        outgoing = torch.cat([x[len(x) - count :] for count in given]).contiguous()
        incoming = collectives.all_to_all_single(outgoing, taken, given, self._group())
        return collectives.wait_tensor(incoming).transpose(0, 1)

    def sent(self, borders: Sequence[int], window: int | None = None) -> int:
        """How many entries of a row all ranks together send in `before`; its backward sends as many back."""
        ranks = range(self.num_ranks)
        return sum(handed_on(borders, source, target, window) for source in ranks for target in ranks)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on each of them; each of these sums has a gradient, and x the sum of them."""
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", self._group()))

    def _group(self) -> dist.ProcessGroup:
        group = self.group or dist.group.WORLD
        assert group is not None
        return group


def deal(length: int, chunk_size: int, num_ranks: int) -> tuple[int, ...]:
    """Borders of shards of whole chunks, as even as they can be; the row's last chunk may be ragged.

    Returns:
        R + 1 positions, from 0 to `length`.

    Raises:
        ValueError: there are fewer chunks than ranks, so that a rank would hold no token.
    """
    if length < 1 or chunk_size < 1:
        raise ValueError(f"length and chunk_size must be at least 1, got {length} and {chunk_size}")
    chunks = -(-length // chunk_size)
    if chunks < num_ranks:
        raise ValueError(
            f"rows of {length} tokens are {chunks} chunks of {chunk_size}, and {num_ranks} ranks need one each:"
            " take longer rows, smaller chunks or fewer ranks"
        )
    return (*(rank * chunks // num_ranks * chunk_size for rank in range(num_ranks)), length)


def handed_on(borders: Sequence[int], source: int, target: int, window: int | None) -> int:
    """How many of rank `source`'s entries rank `target` sees: its last ones, and none of a later rank.

    See `ContextShard.before` for `borders` and `window`.
    """
    if source >= target:
        return 0
    first = 0 if window is None else borders[target] - window
    return max(0, borders[source + 1] - max(borders[source], first))
