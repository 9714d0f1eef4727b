"""Functions in processes of their own."""

import os
import signal

import pytest
import torch

from rat.benchmarks.process import KilledError, in_fresh_process


def seen_there(x: int) -> tuple[int, int, int]:
    return x + 1, os.getpid(), torch.get_num_threads()


def ends(how: str) -> None:
    if how == "error":
        raise ValueError("of no use")
    os.kill(os.getpid(), signal.SIGKILL)


def test_it_runs_elsewhere_with_as_many_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result, process, threads = in_fresh_process(seen_there, 1)
    finally:
        torch.set_num_threads(before)
    assert result == 2
    assert process != os.getpid()
    assert threads == 2


def test_errors_come_back_and_so_does_an_end_from_outside() -> None:
    with pytest.raises(ValueError, match="of no use"):
        in_fresh_process(ends, "error")
    with pytest.raises(KilledError, match="ended with code -9"):
        in_fresh_process(ends, "kill")
