"""How the C library hands out memory to tensors on the CPU."""

import contextlib
import ctypes
import os

# Parameters of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, instead of giving it back to the system each time.

    Otherwise every large tensor is a new mapping whose pages the system has to fill with zeros at first touch, which
    costs as much as an elementwise operation on it. Elsewhere than on glibc nothing happens. PyTorch is told to ask
    for large pages, of which fewer are touched first; it looks when it first allocates, so this has to come before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 0)  # no mapping of its own for any tensor, however large
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_TOP_PAD, 1 << 26)
