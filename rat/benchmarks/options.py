"""What the benchmarks accept, checked before any time is spent."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

Dtype = Literal["float32", "bfloat16", "float16"]


def place(device: str) -> torch.device:
    """The device of a name. Raises ValueError where it is none of this machine."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    gpus = torch.cuda.device_count()
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= gpus):
        raise ValueError(f"there is no device {device!r} here: give cpu, cuda or cuda:N")
    return found


def precision(dtype: str) -> torch.dtype:
    """The dtype of a name. Raises ValueError for one that no layer is measured in."""
    one_of("dtype", [dtype], get_args(Dtype))
    return getattr(torch, dtype)


def one_of(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if there is no name, an unknown one, or one twice."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"name at least one {what}, and each of them once; got {list(names)}")


def positive(**values: int | Sequence[int]) -> None:
    """Raise ValueError for the first value below 1, or a list that is empty."""
    for name, value in values.items():
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
