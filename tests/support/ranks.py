"""Processes that work together, as torchrun would have started them."""

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SOON = timedelta(minutes=2)  # a rank that waits in vain fails then


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on a node of its own."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def together(count: int, work: Callable[..., None], *args: Any) -> None:
    """Call work(*args) in so many processes, and raise what one of them raises."""
    given = (count, free_port(), work, args)
    torch.multiprocessing.start_processes(_one_of_many, given, nprocs=count, start_method="forkserver")


def checked_together(count: int, *checks: Callable[[], None]) -> None:
    """Call the checks, one after the other, in so many processes that a gloo process group joins."""
    together(count, _in_a_group, checks)


def _one_of_many(rank: int, count: int, port: int, work: Callable[..., None], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, count, port)
    work(*args)


def _in_a_group(checks: Sequence[Callable[[], None]]) -> None:
    dist.init_process_group("gloo", timeout=SOON)
    for check in checks:
        check()
    dist.destroy_process_group()
