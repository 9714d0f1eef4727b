"""What a run takes before it is started: how a config is spread over devices, their memory, GPU-hours."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_modules.schedule import accumulation
from rat import CausalLM, ModelConfig
from rat.layers.context_shard import deal
from rat.memory import Sharding, TrainingMemory, TrainingStep, largest_batch, training_memory
from rat.tensor_parallel import check_ranks

GB = 1e9
# By Lightning's names for how products are rounded; weights are fp32 in each of them.
_MIXED = {"32-true": False, "32": False, "None": False, "bf16-mixed": True, "bf16": True, "16-mixed": True, "16": True}
_RESHARDED = {"FULL_SHARD": True, "HYBRID_SHARD": True, "SHARD_GRAD_OP": False, "_HYBRID_SHARD_ZERO2": False}


class NotCountedError(ValueError):
    """A training that may be right, but whose memory is not known."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run as its config describes it.

    Attributes:
        model: the architecture.
        step: one device's part of a training step.
        strategy: what it is called.
        devices: N, of all nodes.
        data_parallel: how many of them, or of their groups that share rows, have rows of their own.
        global_batch_size: sequences of an optimiser step.
        max_steps: optimiser steps; None where the data decides.
    """

    model: ModelConfig
    step: TrainingStep
    strategy: str
    devices: int
    data_parallel: int
    global_batch_size: int
    max_steps: int | None

    def memory(self) -> TrainingMemory:
        """Of one device, with the config's own micro batch."""
        return training_memory(self.model, self.step)

    def largest_batch(self, memory_gb: float) -> tuple[int, TrainingMemory]:
        """The largest micro batch that fits and divides a device's rows of the global batch; what it takes.

        Raises:
            ValueError: not even one sequence fits.
        """
        share = self.global_batch_size // self.data_parallel
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        # with gradients added up, of which the largest batch may need no more
        step = replace(self.step, accumulating=share > 1)
        found = largest_batch(self.model, step, int(memory_gb * GB), sizes)
        if found is None:
            least = training_memory(self.model, replace(step, batch_size=1)).total / GB
            raise ValueError(
                f"one sequence of {step.seq_len} tokens takes {least:.2f} GB of a device, and there are {memory_gb:g}:"
                " shard over more devices, turn on model.activation_checkpointing, let devices share rows"
                " (--strategy context_parallel), or take shorter sequences"
            )
        return found

    def flops(self) -> int | None:
        """Of the whole run, forward and backward, without what checkpointing computes again."""
        if self.max_steps is None:
            return None
        with torch.device("meta"):
            token = 3 * CausalLM(self.model).flops_per_token(self.step.seq_len)
        return token * self.step.seq_len * self.global_batch_size * self.max_steps


def read_plan(config: Any, batch_size: int | None = None, devices: int | None = None) -> Plan:
    """The run that a parsed config for fit describes.

    Args:
        config: of `RatCLI`.
        batch_size: sequences of a micro batch; default: the data's.
        devices: N; default: the trainer's, where auto counts as one of each node.

    Raises:
        NotCountedError: a precision or strategy that is not counted.
        ValueError: devices that do not fit the strategy or the batch.
    """
    trainer, model = config.trainer, ModelConfig(**config.model.model.as_dict())
    data = (config.data or {}).get("init_args") or {}
    batch_size = batch_size or data.get("batch_size") or 1
    if devices is None:
        devices = _count(trainer.devices) * trainer.num_nodes
    if devices < 1 or batch_size < 1:
        raise ValueError(f"devices and batch_size must be at least 1, got {devices} and {batch_size}")
    precision = str(trainer.precision)
    if precision not in _MIXED:
        raise NotCountedError(f"training in {precision} is not counted: choose one of {', '.join(_MIXED)}")
    step = TrainingStep(
        batch_size=batch_size,
        seq_len=data.get("seq_len") or model.max_seq_len,
        bf16=_MIXED[precision],
        checkpointing=config.model.activation_checkpointing,
        gpu=trainer.accelerator != "cpu",
    )
    strategy, step = _spread(trainer, step, devices)
    if step.sharding is not None:
        _check_shares(model, step, step.sharding)
    data_parallel = devices // _sharing(step)
    accumulating = trainer.accumulate_grad_batches
    if config.model.global_batch_size is not None:
        accumulating = accumulation(config.model.global_batch_size, batch_size, data_parallel)
    return Plan(
        model=model,
        step=replace(step, accumulating=accumulating > 1),
        strategy=strategy,
        devices=devices,
        data_parallel=data_parallel,
        global_batch_size=config.model.global_batch_size or accumulating * batch_size * data_parallel,
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
    )


def _count(devices: Any) -> int:
    """How many the Trainer is given on each node."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _spread(trainer: Any, step: TrainingStep, devices: int) -> tuple[str, TrainingStep]:
    """The name of a strategy, and the step with what is sharded and sent."""
    given = trainer.strategy
    name = given if isinstance(given, str) else given.class_path.rpartition(".")[2]
    options = {} if isinstance(given, str) else given.get("init_args") or {}
    if name in ("auto", "single_device", "SingleDeviceStrategy"):
        if devices == 1:
            return "single", step
        if name != "auto":
            raise ValueError(f"a single device is no place for {devices}: choose --strategy ddp or fsdp2")
        name = "ddp"
    if name.startswith("ddp") or name == "DDPStrategy":
        views = options.get("gradient_as_bucket_view") or (options.get("dict_kwargs") or {}).get(
            "gradient_as_bucket_view"
        )
        return "ddp", replace(step, buckets=not views)
    if name in ("fsdp", "FSDPStrategy"):
        return "fsdp", _fsdp(trainer, options, step, devices)
    if name == "FSDP2Strategy":
        return "fsdp2", _fsdp2(options, step, devices)
    raise NotCountedError(f"memory under the strategy {name} is not counted: choose single, ddp, fsdp or fsdp2")


def _fsdp(trainer: Any, options: Any, step: TrainingStep, devices: int) -> TrainingStep:
    """PyTorch's first FSDP, counted as its second with the same dtypes."""
    kind = str(options.get("sharding_strategy") or "FULL_SHARD").rpartition(".")[2]
    if kind not in _RESHARDED:
        raise NotCountedError(f"sharding_strategy {kind} is not counted: choose one of {', '.join(_RESHARDED)}, or ddp")
    dtypes = options.get("mixed_precision") or {}
    default = torch.bfloat16 if step.bf16 else torch.float32
    param_dtype = dtypes.get("param_dtype") or default
    sharding = Sharding(
        **_copies(trainer.num_nodes if "HYBRID" in kind else 1, devices),
        param_dtype=param_dtype,
        root_dtype=param_dtype,
        reduce_dtype=dtypes.get("reduce_dtype") or default,
        reshard_after_forward=_RESHARDED[kind],
    )
    checkpointing = step.checkpointing or bool(options.get("activation_checkpointing_policy"))
    return replace(step, sharding=sharding, checkpointing=checkpointing)


def _fsdp2(options: Any, step: TrainingStep, devices: int) -> TrainingStep:
    """Ours: `lightning_modules.FSDP2Strategy`."""
    named = options.get("param_dtype") or "auto"
    context, tensor = (options.get(f"{shared}_parallel_size") or 1 for shared in ("context", "tensor"))
    if devices % (context * tensor):
        raise ValueError(
            f"context_parallel_size {context} x tensor_parallel_size {tensor} do not divide {devices} devices"
        )
    computing = torch.bfloat16 if step.bf16 else torch.float32
    sharding = Sharding(
        **_copies(options.get("replicas") or 1, devices // tensor),
        context_parallel=context,
        tensor_parallel=tensor,
        param_dtype=computing if named == "auto" else getattr(torch, named),
        reduce_dtype=getattr(torch, options.get("reduce_dtype") or "float32"),
        reshard_after_forward=options.get("reshard_after_forward", True),
    )
    return replace(step, sharding=sharding)


def _sharing(step: TrainingStep) -> int:
    """How many devices are given the same rows."""
    return step.sharding.context_parallel * step.sharding.tensor_parallel if step.sharding else 1


def _check_shares(model: ModelConfig, step: TrainingStep, sharding: Sharding) -> None:
    """Raise ValueError where rows or heads cannot be dealt out."""
    check_ranks(model, sharding.tensor_parallel)
    deal(step.seq_len, model.chunk_size if "rat" in model.pattern else 1, sharding.context_parallel)


def _copies(replicas: int, devices: int) -> dict[str, int]:
    if devices % replicas:
        raise ValueError(f"{replicas} copies of the model do not divide {devices} devices")
    return {"replicas": replicas, "shards": devices // replicas}
