"""A decoding step in Triton: state update, attention over the chunk ends and the new end in one launch.

Few rows alone do not fill a GPU, so the ends of a row and head are split into shares, one program each; the last one
joins them. More shares come in powers of two and are an ordinary argument: nothing is compiled twice because rows
grow. Only tickets that order the programs have to be zero before (4 bytes a row and head).
"""

import math

import torch
import triton
from torch import Tensor

from rat.ops.chunk_decode import kernels, portable
from rat.ops.chunk_decode.in_place import packed, packed_in_place
from rat.ops.launch import Cost, launch

# Programs that fill a GPU: four for each of 128 multiprocessors.
PROGRAMS = 512
# A share of fewer ends costs more to join than its program brings.
FEWEST_ENDS = 64
# Numbers of a tile of keys; as many of values and of weighted sums stand in the registers of 128 threads.
TILE = 4096
NUM_WARPS = 4


def chunk_decode(
    gate_logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    value_state: Tensor,
    key_state: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    gate_bias: Tensor | None,
    lengths: Tensor,
    longest: int,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    """As the reference, computed in fp32; what is fp64 goes to the portable version."""
    tensors = (gate_logits, q, k, v, value_state, key_state, end_keys, end_values, gate_bias)
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    run = portable.chunk_decode if wide else _decode_op
    return run(*tensors, lengths, longest, chunk_size, rope_base)


@torch.library.custom_op(
    "rat::triton_chunk_decode", mutates_args=("value_state", "key_state", "end_keys", "end_values")
)
def _decode_op(
    gate_logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    value_state: Tensor,
    key_state: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    gate_bias: Tensor | None,
    lengths: Tensor,
    longest: int,
    chunk_size: int,
    rope_base: float | None,
) -> Tensor:
    heads, width = end_keys.shape[1], end_keys.shape[3]
    out = torch.empty(len(v), heads, width, dtype=v.dtype, device=v.device)
    tasks, ends = len(v) * heads, longest // chunk_size
    shares = _shares(tasks, ends)
    stored = tasks * shares if shares > 1 else 0
    block = triton.next_power_of_2(width)
    new = [packed(x) for x in (gate_logits, q, k, v)]
    with packed_in_place(value_state, key_state, end_keys, end_values) as places:
        launch(
            kernels.decode,
            (tasks * shares,),
            *new,
            new[0] if gate_bias is None else gate_bias.contiguous(),
            *places,
            lengths.contiguous(),
            out,
            *(out.new_empty(stored, dtype=torch.float32) for _ in range(2)),
            out.new_empty(stored, width, dtype=torch.float32),
            torch.zeros(tasks if stored else 0, dtype=torch.int32, device=v.device),
            *(heads, q.shape[1], shares, chunk_size, math.log2(math.e) / math.sqrt(width)),
            *(stride for x in (*new, *places) for stride in x.stride()[:-1]),
            cost=_cost(q, v, end_keys, gate_bias, ends, shares),
            num_warps=NUM_WARPS,
            WIDTH=width,
            LOG2_BASE=None if rope_base is None else math.log2(rope_base),
            BIAS=gate_bias is not None,
            SPLIT=shares > 1,
            SLOTS=max(1, min(FEWEST_ENDS, TILE // block)),
            BLOCK_D=block,
        )
    return out


@_decode_op.register_fake
def _(gate_logits: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1] // q.shape[2], q.shape[2])


def _shares(tasks: int, ends: int) -> int:
    """Programs for each row and head: a power of two that fills a GPU, unless too few ends are left for each."""
    shares = 1
    while tasks * shares < PROGRAMS and ends > shares * FEWEST_ENDS:
        shares *= 2
    return shares


def _cost(q: Tensor, v: Tensor, end_keys: Tensor, gate_bias: Tensor | None, ends: int, shares: int) -> Cost:
    """Of rows that are all as long as the longest. A key is computed twice, also for the one it is turned with."""
    numbers, size, slot = v.numel(), v.element_size(), end_keys.element_size()
    scratch = 4 * (numbers + 2 * numbers // q.shape[2]) * shares if shares > 1 else 0
    steps = size + size + 4 + (0 if gate_bias is None else gate_bias.element_size())  # logit, y, state and bias
    read = 2 * ends * numbers * slot + 2 * shares * numbers * size + 3 * numbers * steps + scratch
    written = numbers * (4 + 4 + slot + slot + size) + scratch
    return Cost(read, written, 4 * (ends + 1) * numbers + 8 * 3 * numbers)
