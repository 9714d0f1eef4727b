"""What an operation launches and moves, forward and backward, counted without running it.

The kernels say what they move (`rat.ops.launch.Cost`). What PyTorch does beside them (copies, casts, sums) is counted
too: every tensor that an operator reads or writes, once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rat.benchmarks.kernel_cases import Case, Shape, empty_fill
from rat.ops.launch import Capability, Launch, record_launches


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The forward or the backward pass of an operation."""

    direction: str  # forward or backward
    launches: list[Launch]
    bytes_beside: int  # moved by PyTorch's own operators around the kernels
    bytes_minimum: int  # every input read once, every output written once
    flops_minimum: int | None  # of the cost model; None where only bytes count

    @property
    def bytes_moved(self) -> int:
        """By the kernels."""
        return sum(launch.cost.bytes_read + launch.cost.bytes_written for launch in self.launches)

    @property
    def flops(self) -> int:
        """Of the kernels."""
        return sum(launch.cost.flops for launch in self.launches)


def record(case: Case, shape: Shape, dtype: torch.dtype, capability: Capability) -> Iterator[Pass]:
    """The passes of an operation's Triton version on a GPU of this capability; nothing runs on one."""
    with record_launches(capability) as launches:
        call = case.make(shape, empty_fill(dtype, torch.device("cpu")))
        leaves = {name: x.detach().requires_grad_(call.trains) for name, x in call.tensors.items()}
        with _Traffic() as traffic, torch.set_grad_enabled(call.trains):
            outputs = call.run(leaves, "triton")
        yield Pass(
            direction="forward",
            launches=list(launches),
            bytes_beside=traffic.num_bytes,
            bytes_minimum=call.bytes_forward(outputs),
            flops_minimum=call.flops,
        )
        if not call.trains:
            return
        forward = len(launches)
        wanted = [out for out in outputs if out.requires_grad]
        gradients = [torch.empty_like(out) for out in wanted]
        with _Traffic() as traffic:
            torch.autograd.grad(wanted, list(leaves.values()), gradients, allow_unused=True)
        yield Pass(
            direction="backward",
            launches=launches[forward:],
            bytes_beside=traffic.num_bytes,
            bytes_minimum=call.bytes_backward(outputs),
            flops_minimum=None if call.flops is None else 2 * call.flops,
        )


class _Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operators read and write, also inside our own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in OPDEFS:  # ours: what is inside counts
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        in_place = func._schema.is_mutable
        fresh = [x for x in made if x.untyped_storage()._cdata not in known]
        if not in_place and (not fresh or "empty" in name):
            return result  # a view, or memory that nobody has written to
        self.num_bytes += sum(_distinct_bytes(x) for x in (*given, *fresh))
        return result


def _distinct_bytes(x: Tensor) -> int:
    """Of the numbers of x in memory; what is expanded counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(sizes).numel()
