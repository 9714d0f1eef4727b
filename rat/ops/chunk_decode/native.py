"""A decoding step on a CPU: `native.cpp` reads the caches once, in order, as fast as memory gives them."""

import ctypes

import torch
from torch import Tensor

from rat.ops import native
from rat.ops.chunk_decode import portable
from rat.ops.chunk_decode.in_place import packed, packed_in_place
from rat.ops.rotary.portable import angles

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


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
    """As the reference."""
    narrow, states = (gate_logits, q, k, v, end_keys, end_values), (value_state, key_state)
    supported = native.supports(*narrow) and all(x.dtype == torch.float32 for x in states)
    run = _decode_op if supported else portable.chunk_decode
    return run(
        gate_logits, q, k, v, *states, end_keys, end_values, gate_bias, lengths, longest, chunk_size, rope_base
    )  # fmt: skip


class _Rows(ctypes.Structure):
    """`Rows` of native.cpp."""

    _fields_ = (("data", _POINTER), ("row", _I64))


class _Cache(ctypes.Structure):
    """`Cache` of native.cpp."""

    _fields_ = (("data", _POINTER), *((name, _I64) for name in ("row", "head", "slot")))


class _Call(ctypes.Structure):
    """`Call` of native.cpp."""

    _fields_ = (
        *((name, _I64) for name in ("batch", "heads", "groups", "width", "chunk_size", "num_threads")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("lengths", "bias", "cos", "sin")),
        *((name, _Rows) for name in ("gate_logits", "q", "k", "v", "value_state", "key_state", "out")),
        *((name, _Cache) for name in ("keys", "values")),
    )


@torch.library.custom_op(
    "rat::native_chunk_decode", mutates_args=("value_state", "key_state", "end_keys", "end_values")
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
    batch, heads, _, width = end_keys.shape
    if not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise ValueError(f"lengths must lie between 0 and longest, {longest}, got {lengths.tolist()}")
    out = torch.empty(batch, heads, width, dtype=v.dtype)
    bias = None if gate_bias is None else gate_bias.float().contiguous()
    tables: tuple[Tensor | None, ...] = (None, None)
    if rope_base is not None:
        tables = angles(lengths // chunk_size, width, rope_base, torch.float32)
    lengths = lengths.long().contiguous()
    threads = native.threads(2 * batch * heads * width * (longest // chunk_size + 1))
    new = [packed(x) for x in (gate_logits, q.flatten(1), k, v)]
    with packed_in_place(value_state, key_state, end_keys, end_values) as (*states, keys, values):
        call = _Call(
            *(batch, heads, q.shape[1], width, chunk_size, threads, width**-0.5),
            *(native.pointer(x) for x in (lengths, bias, *tables)),
            *(_Rows(x.data_ptr(), x.stride(0)) for x in (*new, *states, out)),
            *(_Cache(x.data_ptr(), *x.stride()[:3]) for x in (keys, values)),
        )
        native.call("chunk_decode", v.dtype, ctypes.byref(call))
    return out


@_decode_op.register_fake
def _(gate_logits: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1] // q.shape[2], q.shape[2])
