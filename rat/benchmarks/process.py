"""A function in a process of its own, whose memory and caches nothing else has touched."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

Result = TypeVar("Result")


class KilledError(RuntimeError):
    """The process was ended from outside, which on a full machine the system does."""


def in_fresh_process(function: Callable[..., Result], *args: object) -> Result:
    """`function(*args)` in a new process with as many threads; it ends with this one.

    Args:
        function: of a module; like its arguments and its result, it is pickled.
        args: its arguments.

    Raises:
        KilledError: a signal has ended the process.
        Exception: what the function raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, torch.get_num_threads(), function, args), daemon=True)
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise KilledError(f"a process of the benchmark ended with code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise error
    return result


def _answer(sender: Connection, num_threads: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this one
    torch.set_num_threads(num_threads)
    try:
        sender.send((function(*args), None))
    except Exception as error:
        sender.send((None, error))
