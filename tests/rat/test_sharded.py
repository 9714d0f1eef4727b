"""The kernels inside FSDP: parameters sharded over two processes, layers recomputed in the backward pass."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard

from rat import CausalLM, ModelConfig
from rat.layers import Block
from rat.ops import Backend, use_backend
from rat.ops.backend import why_not_native, why_not_triton

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=32,
    num_layers=3,
    num_heads=2,
    num_groups=1,
    pattern=("rat", "sliding_window", "rnn"),
    chunk_size=4,
    window_size=5,
    max_seq_len=16,
)
# Without a GPU the Triton kernels run in the interpreter, see tests/conftest.py.
CPU = torch.device("cpu")
REFUSED = {"portable": None, "native": why_not_native(CPU), "triton": why_not_triton(CPU)}
BACKENDS: list[Backend] = [name for name, reason in REFUSED.items() if reason is None]
TOKENS = torch.randint(32, (2, 13), generator=torch.Generator().manual_seed(0))


def new_model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


def gradients(model: CausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}


def one_of_two(rank: int, store: str) -> None:
    """A process of the test below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for backend in BACKENDS:
        shard_and_compare(rank, backend)
    dist.destroy_process_group()


def shard_and_compare(rank: int, backend: Backend) -> None:
    """The gradients of each process's row, averaged, are those of both rows without sharding."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    with use_backend(backend):
        expected = gradients(new_model(), TOKENS)
        model = new_model()
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = {name: grad.full_tensor() for name, grad in gradients(model, TOKENS[rank : rank + 1]).items()}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_sharded_and_recomputed_layers_have_the_gradients_of_whole_ones(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    torch.multiprocessing.start_processes(one_of_two, (store,), nprocs=2, start_method="forkserver")
