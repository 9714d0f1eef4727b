"""Tensors that a kernel writes, in the form it can write."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """x, copied if the numbers of its last axis do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@contextmanager
def packed_in_place(*written: Tensor) -> Iterator[list[Tensor]]:
    """Each `packed`; what the block writes to copies is then copied to the tensors themselves."""
    places = [packed(x) for x in written]
    yield places
    for x, place in zip(written, places, strict=True):
        if place is not x:
            x.copy_(place)
