"""What a device holds at the fullest moment of a training step, counted before anything is allocated.

A whole step (forward, backward, AdamW) runs on tensors without content while PyTorch's own trackers follow every
storage from its making to its end. Where weights are sharded, FSDP2 itself runs, in an imagined group of processes
that sends nothing. So the count is what eager PyTorch would allocate, operation by operation, but for

- the inside of single operations, of which only the loss needs much: its share is computed, see `loss_workspace`;
- torch.compile, which keeps less for the backward than is counted here;
- what is no tensor: the CUDA context, buffers of NCCL, what the allocator rounds up and cannot use;
- gloo, between CPUs: a copy of every whole weight and gradient it sends, for as long as its thread holds on to it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker, _RefType
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from rat.config import ModelConfig
from rat.layers import attention
from rat.layers.context_shard import ContextShard, deal
from rat.model import CausalLM
from rat.ops import sliding_window_attention
from rat.ops.launch import record_launches
from rat.tensor_parallel import shard_axis, split_heads

# Any on which the Triton kernels run: what they keep is the same on all of them.
_GPU = (9, 0)
_LOSS = "torch_nn::_linear_cross_entropy_batch_chunked"


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Weights, gradients and optimiser state in parts, gathered one block at a time (FSDP).

    Attributes:
        shards: devices that share one copy of the model, or of their heads of it.
        replicas: copies; the devices are replicas x shards x tensor_parallel.
        context_parallel: of shards x replicas, those that share a row, each with a run of its tokens.
        tensor_parallel: devices that share a layer, each with some of its heads.
        param_dtype: of gathered weights, and so of activations.
        root_dtype: the same of what belongs to no block: the embedding, which is the head as well, and the last norm.
        reduce_dtype: in which gradients are summed over devices.
        reshard_after_forward: whether a block's weights are let go between its forward and its backward pass.
    """

    shards: int
    replicas: int = 1
    context_parallel: int = 1
    tensor_parallel: int = 1
    param_dtype: torch.dtype = torch.float32
    root_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One device's part of a training step.

    Attributes:
        batch_size: sequences of a micro batch.
        seq_len: T, of whole rows.
        bf16: products in bf16 by autocast; weights are fp32.
        checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again.
        accumulating: whether there are gradients of earlier micro batches to add to; else those of the last step are
            let go between forward and backward, as Lightning does.
        gpu: kernels, loss and optimiser as they run on a GPU; else as on a CPU.
        sharding: None where every device holds the whole model.
        buckets: whether gradients have a second copy to be sent from, as in DDP.
    """

    batch_size: int
    seq_len: int
    bf16: bool = False
    checkpointing: bool = False
    accumulating: bool = False
    gpu: bool = False
    sharding: Sharding | None = None
    buckets: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a device at the fullest moment of a training step, by what they are for.

    Attributes:
        weights: this device's, fp32.
        gradients: this device's, fp32.
        optimizer: AdamW's two means, and what its step needs beside them if that is the fullest moment.
        activations: what the forward pass keeps for the backward, the batch included, and the results at hand.
        loss: chunks of logits, and the gradients that the loss finds while it has them.
        temporary: what the backward pass holds for a moment.
        gathered: whole weights of blocks at work, and their gradients before these are summed.
        communication: what is being sent: buffers of FSDP, or DDP's buckets.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    temporary: int = 0
    gathered: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@cache
def training_memory(config: ModelConfig, step: TrainingStep) -> TrainingMemory:
    """Count a step of the model; seconds of work, and no memory to speak of.

    Args:
        config: of the model.
        step: how it is trained.

    Raises:
        RuntimeError: this process belongs to a group already, and weights are sharded.
    """
    with ExitStack() as stack:
        if step.gpu:
            stack.enter_context(record_launches(_GPU))
            # A GPU's kernels for windows and for the last queries of a row keep what causal attention does: their
            # inputs, their output, a sum for each row.
            stack.enter_context(patch.object(attention, "sliding_window_attention", _without_window))
            stack.enter_context(patch.object(attention.Attention, "_attend_last", _attend_last))
        stack.enter_context(patch.object(attention, "causal_lower_right", _causal_mask))
        mesh = stack.enter_context(_imagined_mesh(step.sharding)) if step.sharding else None
        stack.enter_context(patch.object(DeviceMesh, "_concatenate", _with_content(DeviceMesh._concatenate)))
        stack.enter_context(FakeTensorMode())
        found = _by_part(_watch_step(_build(config, step, mesh), step, _last_shard(config, step)))
    return replace(found, communication=4 * _size(config)) if step.buckets else found


def largest_batch(
    config: ModelConfig, step: TrainingStep, memory: int, sizes: Sequence[int]
) -> tuple[int, TrainingMemory] | None:
    """The largest micro batch whose step fits.

    Args:
        config: of the model.
        step: how it is trained; its batch_size does not matter.
        memory: bytes of a device.
        sizes: micro batches to choose from, in ascending order.

    Returns:
        One of `sizes`, and what it takes; None if not even the first one fits.
    """
    best = None
    low, high = 0, len(sizes)
    while low < high:  # what a batch takes grows with it
        # the first one first: everything else is out of the question where that does not fit
        middle = (low + high) // 2 if best else low
        found = training_memory(config, replace(step, batch_size=sizes[middle]))
        if found.total <= memory:
            best, low = (sizes[middle], found), middle + 1
        else:
            high = middle
    return best


def loss_workspace(rows: int, vocab_size: int, d_model: int, dtype: torch.dtype, gpu: bool, chunk: int) -> int:
    """Bytes that PyTorch's `linear_cross_entropy` needs inside, beyond its results (`LinearCrossEntropyOptions`).

    Args:
        rows: tokens.
        vocab_size: V.
        d_model: D.
        dtype: of the last norm's output: fp32 or bf16.
        gpu: where it runs. There it chooses its chunks itself ("aspect_ratio:2"), and multiplies bf16 as it is.
        chunk: tokens whose logits are held at a time, on a CPU.
    """
    if gpu:
        fitting = -(-rows // -(-vocab_size // d_model))
        chunk = max(1, (1 << (fitting - 1).bit_length()) // 2)
    chunk = min(chunk, rows)
    if dtype == torch.float32:
        return 4 * chunk * (vocab_size + d_model)
    if gpu:  # "compact": fp32 logits and their rounding, inputs in fp32, rows of the weight
        return chunk * (6 * vocab_size + 6 * d_model)
    # "accurate": everything in fp32, the weight, its gradient and that of the inputs included
    return 4 * (chunk * (vocab_size + 2 * d_model) + 2 * vocab_size * d_model + rows * d_model)


class _Loss(_RefType):
    LOSS = "Loss"


class _LossTracker:
    """Beside a tracker of PyTorch's: counts the loss by itself, with what it needs inside."""

    gpu: bool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracker: Any = super()
        if func.name() != _LOSS:
            return tracker.__torch_dispatch__(func, types, args, kwargs)
        x, (vocab_size, d_model), chunk = args[0], args[1].shape, args[8]
        size = loss_workspace(len(x), vocab_size, d_model, x.dtype, self.gpu, chunk)
        inside = torch.empty(size, dtype=torch.uint8, device=x.device)
        self._mark(inside)

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = func(*args, **kwargs)
            self._mark(*result)
            return result

        return tracker.__torch_dispatch__(marked, types, args, kwargs)

    def _update_peak_stats(self, peak_state: object) -> None:
        """Only the fullest moment of all: those of single modules cost more time than everything else."""
        tracker: Any = self
        for device, now in tracker._curr_mem_snap.items():
            if now["Total"] > tracker._peak_mem.get(device, 0):
                tracker._peak_mem[device], tracker._peak_mem_snap[device] = now["Total"], dict(now)

    def _mark(self, *tensors: Tensor) -> None:
        tracker: Any = self
        for x in tensors:
            tracker._update_and_maybe_create_winfos(x, _Loss.LOSS)


class _WholeTracker(_LossTracker, MemTracker):
    pass


class _ShardedTracker(_LossTracker, FSDPMemTracker):
    pass


def _build(config: ModelConfig, step: TrainingStep, mesh: DeviceMesh | None) -> CausalLM:
    """The model as it is trained, without content."""
    model = CausalLM(config)
    blocks: Any = model.layers
    if step.checkpointing:
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block)
    if (sharding := step.sharding) is not None:
        assert mesh is not None
        split_heads(model, mesh["tensor"])
        options: dict[str, Any] = {
            "mesh": mesh["replicate", "shard"] if sharding.replicas > 1 else mesh["shard"],
            "shard_placement_fn": partial(shard_axis, num_shards=sharding.shards),
        }
        of_blocks, of_rest = (
            MixedPrecisionPolicy(dtype, sharding.reduce_dtype) for dtype in (sharding.param_dtype, sharding.root_dtype)
        )
        for block in blocks:
            # the last one hands its output to the root
            policy = replace(of_blocks, output_dtype=sharding.root_dtype) if block is blocks[-1] else of_blocks
            fully_shard(block, mp_policy=policy, reshard_after_forward=sharding.reshard_after_forward, **options)
        fully_shard(model, mp_policy=of_rest, **options)
    return model


def _with_content(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which needs tensors with content, outside of FakeTensorMode."""

    def outside(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return outside


def _without_window(*args: Tensor, window_size: int | None, **options: Any) -> Tensor:
    return sliding_window_attention(*args, window_size=None, **options)


def _attend_last(self: Any, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2)


def _causal_mask(queries: int, keys: int) -> Tensor:
    """What PyTorch's own, which cannot be without content, makes for itself on a CPU."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _last_shard(config: ModelConfig, step: TrainingStep) -> ContextShard | None:
    """The part of a row that takes most: its last tokens, which see all others."""
    ranks = step.sharding.context_parallel if step.sharding else 1
    if ranks == 1:
        return None
    borders = deal(step.seq_len, config.chunk_size if "rat" in config.pattern else 1, ranks)
    return ContextShard(borders, rank=ranks - 1, group=dist.new_group(range(ranks)))


def _watch_step(model: CausalLM, step: TrainingStep, shard: ContextShard | None) -> dict[str, int]:
    """Run a step that is not the first one; bytes at its fullest moment by the tracker's own names."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=step.gpu)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    batch = [torch.zeros(step.batch_size, step.seq_len, dtype=torch.long) for _ in ("input_ids", "labels")]
    own = batch if shard is None else [shard.part(x) for x in batch]
    tracker: Any = _ShardedTracker(model, optimizer) if step.sharding else _WholeTracker()
    tracker.gpu, tracker._ref_class = step.gpu, [*tracker._ref_class, *_Loss]
    tracker.track_inputs(batch) if step.sharding else tracker.track_external(model, optimizer, *batch)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
            loss = model(*own, shard=shard)
        if not step.accumulating:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(name, "value", name): count for name, count in found.items()}


def _by_part(found: dict[str, int]) -> TrainingMemory:
    """The trackers' names, put together to ours."""
    parts = {
        "weights": ("Parameter", "Sharded Param", "Buffer"),
        "gradients": ("Gradient", "Sharded Grad"),
        "optimizer": ("Optstate", "OptState"),
        "activations": ("Activation", "Inputs", "Other"),
        "loss": ("Loss",),
        "temporary": ("Temp",),
        "gathered": ("Unsharded Param", "Unsharded Grad"),
        "communication": ("All Gather", "Reduce Scatter"),
    }
    memory = TrainingMemory(**{part: sum(found.get(name, 0) for name in names) for part, names in parts.items()})
    assert memory.total == found["Total"], found
    return memory


def _size(config: ModelConfig) -> int:
    with torch.device("meta"):
        return CausalLM(config).num_parameters()


@contextmanager
def _imagined_mesh(sharding: Sharding) -> Iterator[DeviceMesh]:
    """Processes of which only this one exists: what it receives from the others is never looked at."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

    if dist.is_initialized():
        raise RuntimeError("memory of sharded weights is counted in a process of its own, which is part of no group")
    shape = (sharding.replicas, sharding.shards, sharding.tensor_parallel)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(shape))
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))
    finally:
        dist.destroy_process_group()
