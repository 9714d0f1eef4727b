"""Many prompts continued at once by a whole model: how long it takes, and how much memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from rat.allocator import keep_freed_memory
from rat.benchmarks.footprint import ProcessPeak, is_out_of_memory
from rat.benchmarks.steps import fill
from rat.config import ModelConfig
from rat.generation import PREFILL_TOKENS
from rat.layers import LayerState
from rat.model import CausalLM
from rat.ops import Backend, use_backend

# Pieces of prompts that a rehearsal runs: the heap of a CPU grows over the first few.
REHEARSED_PIECES = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a model, but for the number of rows.

    Attributes:
        config: of the model; its weights are random.
        prompt_length: tokens of every prompt.
        new_tokens: tokens that each row is continued by, at least 2; all but the first take a decoding step.
        dtype: of weights and caches.
        backend: of `rat.ops`.
        device: cpu, cuda or cuda:N.
    """

    config: ModelConfig
    prompt_length: int
    new_tokens: int
    dtype: torch.dtype
    backend: Backend
    device: str

    @property
    def longest(self) -> int:
        """Tokens of a row at the end."""
        return self.prompt_length + self.new_tokens

    def state_bytes(self) -> int:
        """Of the decoding state of a row at the end."""
        return self.empty_model().cache_bytes(self.longest, self.dtype.itemsize)

    def row_bytes(self) -> int:
        """What one more row takes at least: its state, its new tokens, and the widest activation of a step."""
        widest = max(self.config.vocab_size, 4 * self.config.d_model)
        return self.state_bytes() + 8 * self.new_tokens + widest * self.dtype.itemsize

    def empty_model(self) -> CausalLM:
        """The model without memory for its weights, for counting."""
        with torch.device("meta"):
            return CausalLM(self.config).to(self.dtype)


class Served(NamedTuple):
    """Seconds of the two halves, and the most bytes held: weights, cache, activations."""

    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int


def serve(workload: Workload, batch_size: int) -> Served | None:
    """Prefill and decode `batch_size` rows greedily; None if memory does not suffice. For a fresh process.

    Prompts go in a few rows at a time, so that it is the cache that fills the memory, not the prompts' activations.
    """
    try:
        with torch.inference_mode(), use_backend(workload.backend):
            peak, model = _begin(workload)
            state = model.new_state(batch_size, workload.longest)
            start = time.perf_counter()
            first = torch.cat(list(_prefill(model, state, workload, batch_size)))
            _wait(workload.device)
            middle = time.perf_counter()
            _decode(model, state, first, workload.new_tokens)
            _wait(workload.device)
            return Served(middle - start, time.perf_counter() - middle, peak.bytes())
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise


def rehearse(workload: Workload, batch_size: int) -> int | None:
    """The memory of `serve` in a moment: some prompts, then steps at the end of a state filled at random.

    Returns:
        The most bytes held; None if memory does not suffice.
    """
    try:
        with torch.inference_mode(), use_backend(workload.backend):
            peak, model = _begin(workload)
            state = model.new_state(batch_size, workload.longest)
            for part in state:
                fill(part, 0)
            for _ in islice(_prefill(model, state, workload, batch_size), REHEARSED_PIECES):
                pass
            for part in state:
                part.lengths.fill_(workload.longest - 2)
                part.longest = workload.longest - 2
            _decode(model, state, torch.zeros_like(state[0].lengths), 3)
            return peak.bytes()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise


def _begin(workload: Workload) -> tuple[ProcessPeak, CausalLM]:
    """Make the model in its dtype (there is no wider copy of it at any time), and count memory from before it on."""
    keep_freed_memory()
    device = torch.device(workload.device)
    # What the libraries load at their first use is not the model's.
    config, heads = workload.config, workload.config.num_groups
    width = config.d_model // config.num_heads * heads
    small = replace(config, vocab_size=2, num_layers=len(config.pattern), num_heads=heads, d_model=width)
    warm = _model(small, workload.dtype, device)
    state = warm.new_state(1, 3)
    for tokens in (2, 1):
        warm.step(torch.zeros(1, tokens, dtype=torch.long, device=device), state)
    del warm, state
    return ProcessPeak(device), _model(config, workload.dtype, device)


def _model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return CausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _prefill(model: CausalLM, state: list[LayerState], workload: Workload, batch_size: int) -> Iterator[Tensor]:
    """Put random prompts into the empty `state`, a piece of the rows at a time; the next token (rows,) of each."""
    length = workload.prompt_length
    count = max(1, PREFILL_TOKENS // length)
    for start in range(0, batch_size, count):
        rows = slice(start, min(batch_size, start + count))
        ids = torch.randint(model.config.vocab_size, (rows.stop - rows.start, length), device=workload.device)
        piece = [_view(part, rows) for part in state]
        for first in range(0, length, PREFILL_TOKENS):
            logits = model.step(ids[:, first : first + PREFILL_TOKENS], piece)
        for part, done in zip(state, piece, strict=True):
            _put_back(part, rows, done)
        yield logits.argmax(-1)
    for part in state:
        part.longest = length


def _view(state: LayerState, rows: slice) -> LayerState:
    """The state of some rows, in the memory of all, before their first token."""
    tensors = {name: x[rows] for name, x in state.tensors.items()}
    return replace(state, lengths=torch.zeros_like(state.lengths[rows]), longest=0, tensors=tensors)


def _put_back(state: LayerState, rows: slice, done: LayerState) -> None:
    """Keep what a mixer has not written in place."""
    state.lengths[rows] = done.lengths
    for name, x in done.tensors.items():
        target = state.tensors[name][rows]
        if x.data_ptr() != target.data_ptr():
            target.copy_(x)


def _decode(model: CausalLM, state: list[LayerState], first: Tensor, new_tokens: int) -> Tensor:
    """The likeliest continuation of every row from its first new token (B,) on; (B, new_tokens)."""
    tokens = first.new_empty(len(first), new_tokens)
    tokens[:, 0] = first
    for i in range(1, new_tokens):
        tokens[:, i] = model.step(tokens[:, i - 1, None], state).argmax(-1)
    return tokens


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
