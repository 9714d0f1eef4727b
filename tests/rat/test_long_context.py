"""The paper's XL at 131072 tokens, on tensors without content: it runs, and this is what it keeps."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing._internal.distributed.fake_pg import FakeStore

from rat import CausalLM, ContextShard, ModelConfig
from rat.config import MixerName
from rat.layers import Block

LENGTH, RANKS = 131072, 16


def xl(*pattern: MixerName) -> CausalLM:
    return CausalLM(ModelConfig(vocab_size=32000, d_model=2048, num_layers=24, num_heads=16, pattern=pattern))


@pytest.fixture
def one_of_many() -> Iterator[ContextShard]:
    """The shard of a process whose collectives are imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=RANKS)
    yield ContextShard.of(LENGTH, 16)
    dist.destroy_process_group()


def kept(model: CausalLM, length: int, shard: ContextShard | None = None) -> int:
    """Bytes that the loss of one row keeps for its backward; weights do not count. The backward has to run."""
    found: dict[int, Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        found.setdefault(x.untyped_storage()._cdata, x)
        return x

    ids = torch.zeros(1, length, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids, shard=shard)
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    return sum(x.untyped_storage().nbytes() for storage, x in found.items() if storage not in weights)


@pytest.mark.parametrize("pattern", [("rat",), ("rat", "sliding_window")], ids="-".join)
def test_a_row_is_dealt_out_with_what_it_keeps(pattern: tuple[MixerName, ...], one_of_many: ContextShard) -> None:
    with FakeTensorMode():
        whole = kept(xl(*pattern), LENGTH)
        part = kept(xl(*pattern), one_of_many.length, one_of_many)
    assert whole / RANKS < part < 1.2 * whole / RANKS


def test_a_recomputed_block_keeps_its_input_alone() -> None:
    with FakeTensorMode():
        model = xl("rat")
        assert model(torch.zeros(1, LENGTH, dtype=torch.long)).shape == (1, LENGTH, 32000)
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        inputs = 24 * LENGTH * 2048 * 4
        assert inputs < kept(model, LENGTH) < 1.2 * inputs
