"""FSDP and FSDP2 as strategies of the Trainer, and what has to be gathered where processes share one model."""

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.strategies import FSDPStrategy as LightningFSDP
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lightning_modules.sharded_checkpoints import WholeFolders
from rat import CausalLM

DType = Literal["float32", "bfloat16", "float16"]


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
        save_distributed_checkpoint: a checkpoint is a folder to which every rank writes what it holds; false: one
            file, written by rank 0.
        kwargs: process_group_backend and timeout, see `ModelParallelStrategy`.

    Raises:
        ValueError: before training, if replicas do not divide the devices.
    """

    def __init__(
        self,
        *,
        param_dtype: DType | Literal["auto"] = "auto",
        reduce_dtype: DType = "float32",
        reshard_after_forward: bool = True,
        replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward, self.replicas = reshard_after_forward, replicas

    def setup_environment(self) -> None:
        """Join the other processes. All of them have data of their own; Lightning's auto means one for each node."""
        devices = self.num_nodes * self.num_processes
        if self.replicas < 1 or devices % self.replicas:
            raise ValueError(f"replicas {self.replicas} do not divide {devices} devices: choose a divisor, such as 1")
        self._data_parallel_size = devices
        super().setup_environment()

    def shard(self, model: CausalLM) -> None:
        """Keep this rank's part of every weight of `model`; on its device, with each block gathered when it runs."""
        shape = (self.replicas, self.world_size // self.replicas)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        computing = _plugin_to_compute_dtype(self.precision_plugin)
        policy = MixedPrecisionPolicy(
            param_dtype=computing if self.param_dtype == "auto" else getattr(torch, self.param_dtype),
            reduce_dtype=getattr(torch, self.reduce_dtype),
        )
        options: dict[str, Any] = {"mesh": mesh if self.replicas > 1 else mesh["shard"]}
        # What is left to the root is the final norm and the embedding, which is the head as well. They stay gathered
        # between their uses, and in full precision, since the loss is a sum over all tokens.
        last = replace(policy, output_dtype=model.norm.weight.dtype)
        for layer in model.layers:
            own = last if layer is model.layers[-1] else policy
            fully_shard(layer, mp_policy=own, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype), **options)


def scale_gradients(root: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient of `root` by `factor`, a scalar on their device."""
    if gradients := [p.grad for p in root.parameters() if p.grad is not None]:
        torch._foreach_mul_(gradients, factor)


def clip_gradients(root: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients such that their norm is at most `max_norm`; None leaves them.

    Args:
        root: what the strategy trains: a module, or its wrapping in DDP or FSDP; FSDP2's counts as a module.
        max_norm: of the gradients of all ranks' parameters together.

    Returns:
        The norm before, a scalar, the same on every rank. All ranks have to call this together.
    """
    if isinstance(root, FullyShardedDataParallel):
        return root.clip_grad_norm_(float("inf") if max_norm is None else max_norm)
    norm = get_total_norm([p.grad for p in root.parameters() if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        clip_grads_with_norm_(root.parameters(), max_norm, norm)
    return norm


def gather_weights(root: nn.Module) -> dict[str, Tensor]:
    """The whole weights of `root` under the names they have without wrappers, on the CPU of rank 0; others get none.

    Args:
        root: as for `clip_gradients`. All ranks have to call this together.
    """
    return get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
