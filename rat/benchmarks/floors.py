"""The least time that a layer's work can take: its FLOPs at a matrix product's rate, its bytes at a copy's."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rat.benchmarks.timing import Rates
from rat.layers import Mixer
from rat.model import CausalLM

Mode = Literal["train", "prefill", "decode"]


class Floor(NamedTuple):
    """A time that cannot be beaten, and whether `arithmetic` or `bytes` set it."""

    seconds: float
    limit: Literal["arithmetic", "bytes"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be computed and moved, however it is done."""

    flops: int
    num_bytes: int

    def floor(self, rates: Rates) -> Floor:
        """The larger of the two times."""
        computing, moving = self.flops / rates.arithmetic, self.num_bytes / rates.bytes_per_second
        return Floor(computing, "arithmetic") if computing >= moving else Floor(moving, "bytes")


def work(layer: Mixer, mode: Mode, batch_size: int, seq_len: int) -> Work:
    """The work of one layer; every input is read once and every output written once.

    - train: a forward pass of B rows of T tokens, and a backward twice as dear. Weights, x and the gradient of y are
      read; y, the gradients of x and of the weights are written.
    - prefill: the same rows forward. Weights and x are read; y and the decoding state are written.
    - decode: one token for each of B rows that stand at position T. Weights, x and the state are read; y, the
      recurrent part of the state and one more key and value are written.

    Args:
        layer: tells FLOPs, sizes and dtype; the three modes keep weights and activations in one dtype.
        mode: which of them.
        batch_size: B.
        seq_len: T.
    """
    size = layer.in_proj.weight.element_size()
    weights = sum(p.nbytes for p in layer.parameters())
    if mode == "decode":
        # a token at position T sees what the average token of a row of 2T sees
        flops = batch_size * layer.flops_per_token(2 * seq_len)
        row = 2 * layer.d_model * size + _touched_by_a_step(layer, seq_len)
        return Work(flops=flops, num_bytes=weights + batch_size * row)
    tokens = batch_size * seq_len
    flops = tokens * layer.flops_per_token(seq_len)
    x = tokens * layer.d_model * size
    if mode == "train":
        return Work(flops=3 * flops, num_bytes=2 * weights + 4 * x)
    return Work(flops=flops, num_bytes=weights + 2 * x + batch_size * state_bytes(layer, seq_len))


def decode_work(model: CausalLM, batch_size: int, position: int) -> Work:
    """The work of a whole model that takes one token for each of B rows at `position`.

    Weights and state are read; logits, the recurrent part of the state and one more key and value are written.
    """
    weights = sum(p.nbytes for p in model.parameters())
    head = model.embedding.weight
    row = head.element_size() * len(head) + sum(_touched_by_a_step(layer.mixer, position) for layer in model.layers)
    return Work(flops=batch_size * model.flops_per_token(2 * position), num_bytes=weights + batch_size * row)


def state_bytes(layer: Mixer, seq_len: int) -> int:
    """Bytes of the decoding state that a row of `seq_len` tokens has filled; recurrences are fp32."""
    cached = min(layer.cache_elements(seq_len) - layer.recurrent_elements, 2 * seq_len * layer.d_model)
    return layer.in_proj.weight.element_size() * cached + 4 * layer.recurrent_elements


def _touched_by_a_step(layer: Mixer, seq_len: int) -> int:
    """Bytes of a row's state that one more token reads, and those that it writes."""
    has_cache = layer.cache_elements(seq_len) > layer.recurrent_elements
    key_and_value = 2 * layer.d_model * layer.in_proj.weight.element_size() if has_cache else 0
    return state_bytes(layer, seq_len) + 4 * layer.recurrent_elements + key_and_value
