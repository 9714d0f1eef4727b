"""FSDP and FSDP2 as strategies of the Trainer, and what has to be gathered where processes share one model."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.strategies import FSDPStrategy as LightningFSDP
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lightning_modules.sharded_checkpoints import WholeFolders
from rat import CausalLM, ContextShard
from rat.tensor_parallel import shard_axis, split_heads

DType = Literal["float32", "bfloat16", "float16"]


class DataRank(NamedTuple):
    """Whose rows a process is given.

    Attributes:
        rank, size: it has those of rank `rank` of `size`.
        sharing: how many processes have the same ones.
        writes: whether it is the one of them to tell of these rows.
    """

    rank: int
    size: int
    sharing: int
    writes: bool

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """This process's."""
        given = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        sharing = trainer.world_size // given["num_replicas"]
        return cls(given["rank"], given["num_replicas"], sharing, writes=trainer.global_rank % sharing == 0)


class FSDPStrategy(WholeFolders, LightningFSDP):
    """Lightning's, with checkpoints that are whole or not there.

    Raises:
        ValueError: when the Trainer is made, if it is to run on CPUs.
    """

    def _configure_launcher(self) -> None:
        # Lightning refuses by type(strategy), not for what is derived from it
        if self.root_device.type == "cpu":
            raise ValueError("FSDPStrategy requires a GPU accelerator: take configs/strategy/fsdp2.yaml on CPUs")
        super()._configure_launcher()


class FSDP2Strategy(WholeFolders, ModelParallelStrategy):
    """Weights, gradients and optimiser state are sharded over all devices, GPUs or CPUs, one block at a time.

    `LanguageModel.configure_model` hands its model to `shard`.

    Args:
        param_dtype: of gathered weights, and so of what a block is given and gives. auto: the one that the Trainer's
            precision multiplies in. float32 rounds no more than other strategies, and moves more bytes.
        reduce_dtype: in which gradients are summed over devices.
        reshard_after_forward: let go of a block's gathered weights after its forward pass, and gather them again for
            the backward pass. false moves a third less and needs more memory.
        replicas: copies of the model, each of them sharded over its part of the devices (hybrid sharding). With one
            for each node, weights are gathered inside a node and only gradients travel between nodes.
        context_parallel_size: devices that share a row, each with a run of its tokens (`rat.ContextShard`).
        tensor_parallel_size: devices that share a layer, each with some of its heads (`rat.tensor_parallel`). They
            are neighbours, and of one node.
        save_distributed_checkpoint: a checkpoint is a folder to which every rank writes what it holds; false: one
            file, written by rank 0.
        kwargs: process_group_backend and timeout, see `ModelParallelStrategy`.

    Raises:
        ValueError: before training, if sizes do not divide the devices or the model.
    """

    def __init__(
        self,
        *,
        param_dtype: DType | Literal["auto"] = "auto",
        reduce_dtype: DType = "float32",
        reshard_after_forward: bool = True,
        replicas: int = 1,
        context_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        sizes = {"replicas": replicas, "context_parallel_size": context_parallel_size}
        for name, size in {**sizes, "tensor_parallel_size": tensor_parallel_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        super().__init__(
            data_parallel_size="auto",
            # Lightning's name for all devices that are given the same rows
            tensor_parallel_size=context_parallel_size * tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward, self.replicas = reshard_after_forward, replicas
        self.context_parallel_size, self.tensor_parallel_size = context_parallel_size, tensor_parallel_size

    def setup_environment(self) -> None:
        """Join the other processes; those that share rows are neighbours."""
        devices, sharing = self.num_nodes * self.num_processes, self.context_parallel_size * self.tensor_parallel_size
        if devices % sharing or self.num_processes % self.tensor_parallel_size:
            raise ValueError(
                f"context_parallel_size {self.context_parallel_size} x tensor_parallel_size"
                f" {self.tensor_parallel_size} must divide {devices} devices, and the latter the {self.num_processes}"
                " of a node: choose divisors, such as 1"
            )
        copies = devices // self.tensor_parallel_size
        if copies % self.replicas:
            raise ValueError(f"replicas {self.replicas} do not divide {copies} devices: choose a divisor, such as 1")
        self._data_parallel_size = devices // sharing
        super().setup_environment()
        if self.context_parallel_size > 1:
            mesh = self._mesh(data=-1, context=self.context_parallel_size, tensor=self.tensor_parallel_size)
            self._context_group = mesh["context"].get_group()

    def context_shard(self, length: int, chunk_size: int) -> ContextShard | None:
        """This device's part of rows of `length` tokens; None where it has whole rows. See `ContextShard.of`."""
        if self.context_parallel_size == 1:
            return None
        return ContextShard.of(length, chunk_size, self._context_group)

    def shard(self, model: CausalLM) -> None:
        """Keep this rank's part of every weight of `model`; on its device, with each block gathered when it runs."""
        mesh = self._mesh(replicate=self.replicas, shard=-1, tensor=self.tensor_parallel_size)
        split_heads(model, mesh["tensor"])
        computing = _plugin_to_compute_dtype(self.precision_plugin)
        policy = MixedPrecisionPolicy(
            param_dtype=computing if self.param_dtype == "auto" else getattr(torch, self.param_dtype),
            reduce_dtype=getattr(torch, self.reduce_dtype),
        )
        options: dict[str, Any] = {
            "mesh": mesh["replicate", "shard"] if self.replicas > 1 else mesh["shard"],
            "shard_placement_fn": partial(shard_axis, num_shards=mesh["shard"].size()),
        }
        # What is left to the root is the final norm and the embedding, which is the head as well. They stay gathered
        # between their uses, and in full precision, since the loss is a sum over all tokens.
        last = replace(policy, output_dtype=model.norm.weight.dtype)
        for layer in model.layers:
            own = last if layer is model.layers[-1] else policy
            fully_shard(layer, mp_policy=own, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype), **options)

    def _mesh(self, **sizes: int) -> DeviceMesh:
        """All devices, neighbours along the last dimension; -1 stands for what remains."""
        rest = self.world_size // -math.prod(sizes.values())
        shape = tuple(rest if size < 0 else size for size in sizes.values())
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=tuple(sizes))


def shards_weights(strategy: Strategy) -> bool:
    """Whether a process holds only its part of the weights, so that it cannot run the model alone."""
    return isinstance(strategy, LightningFSDP | ModelParallelStrategy)


@torch.no_grad()
def scale_gradients(root: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient of `root` by `factor`, a scalar on their device."""
    gradients = [p.grad for p in root.parameters() if p.grad is not None]
    if gradients:
        torch._foreach_mul_([x.to_local() if isinstance(x, DTensor) else x for x in gradients], factor)


def gradient_norm(root: nn.Module) -> Tensor:
    """The norm of the gradients of all ranks' parameters together, a scalar, the same on every rank.

    Args:
        root: what the strategy trains: a module, or its wrapping in DDP or FSDP; FSDP2's counts as a module. All ranks
            have to ask together.
    """
    if isinstance(root, FullyShardedDataParallel):
        return root.clip_grad_norm_(float("inf"))
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for gradient in (p.grad for p in root.parameters() if p.grad is not None):
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = [get_total_norm(gradients) for gradients in by_mesh.values()]
    return get_total_norm([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])


def clip_gradients(root: nn.Module, max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, such that it is at most `max_norm`."""
    scale_gradients(root, (max_norm / (norm + 1e-6)).clamp(max=1))


def gather_weights(root: nn.Module) -> dict[str, Tensor]:
    """The whole weights of `root` under the names they have without wrappers, on the CPU of rank 0; others get none.

    Args:
        root: as for `gradient_norm`. All ranks have to call this together.
    """
    return get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
