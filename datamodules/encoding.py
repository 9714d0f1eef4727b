"""Text into token ids on all cores, in order.

Each process encodes batches on its own with a single thread and sends back flat arrays, so that neither the encoding
nor the (slow) way from Python's integers to numpy waits for another process.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from datamodules.shards import shard_dtype
from datamodules.text_sources import Document
from datamodules.tokenizer import end_of_text_id, load_tokenizer

# Enough for a process to do while the next batch travels; a longer document is a batch of its own.
_BATCH_CHARS = 500_000


class Encoded(NamedTuple):
    """A document: its tokens (N,), the end of text included, and the bytes and characters of its text."""

    tokens: NDArray[Any]
    num_bytes: int
    num_chars: int
    held_out: bool


class _Batch(NamedTuple):
    tokens: NDArray[Any]  # of all documents, flat
    lengths: NDArray[np.int64]  # tokens of each
    num_bytes: list[int]


class Encoder:
    """Processes that encode; they live as long as the `with` block.

    Args:
        tokenizer: the tokenizer.json.
        num_processes: 1 encodes in this one.
    """

    def __init__(self, tokenizer: Path, num_processes: int) -> None:
        self._tokenizer, self._num_processes = tokenizer, num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._num_processes == 1:
            _start(self._tokenizer)
        else:
            # spawned, because a fork would inherit the threads of the tokenizer or of torch
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_processes, context, _start, (self._tokenizer,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The documents in order, each with an end of text; only a few batches are held at a time."""
        for batch, result in self._results(_batches(documents)):
            pieces = np.split(result.tokens, np.cumsum(result.lengths)[:-1])
            for document, tokens, num_bytes in zip(batch, pieces, result.num_bytes, strict=True):
                yield Encoded(tokens, num_bytes, len(document.text), document.held_out)

    def _results(self, batches: Iterator[list[Document]]) -> Iterator[tuple[list[Document], _Batch]]:
        if self._pool is None:
            yield from ((batch, _encode([document.text for document in batch])) for batch in batches)
            return
        waiting: deque[tuple[list[Document], Future[_Batch]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, self._pool.submit(_encode, [document.text for document in batch])))
                if len(waiting) > 2 * self._num_processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "a process that encodes was ended from outside, most likely for want of memory: use fewer"
                " --num_processes"
            ) from error


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        if batch and chars + len(document.text) > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        batch.append(document)
        chars += len(document.text)
    if batch:
        yield batch


# Of each process: its tokenizer, and what it says of ids.
_state: tuple[Tokenizer, int, np.dtype[Any]]


def _start(tokenizer: Path) -> None:
    global _state
    if (parent := multiprocessing.parent_process()) is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Ctrl-C is for the parent, which ends its processes; one that is killed cannot, so they look themselves
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    loaded = load_tokenizer(tokenizer)
    _state = loaded, end_of_text_id(loaded), np.dtype(shard_dtype(loaded.get_vocab_size()))


def _encode(texts: list[str]) -> _Batch:
    tokenizer, eos_id, dtype = _state
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.array([len(encoding) + 1 for encoding in encodings], dtype=np.int64)
    tokens = np.full(lengths.sum(), eos_id, dtype)
    for end, length, encoding in zip(np.cumsum(lengths).tolist(), lengths.tolist(), encodings, strict=True):
        tokens[end - length : end - 1] = np.fromiter(encoding.ids, dtype, length - 1)
    return _Batch(tokens, lengths, [len(text.encode()) for text in texts])
