"""One decoding step of a RAT layer: the recurrence, attention over the chunk ends, and the new end, in one call."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, needs_gradient, select

_IMPLEMENTATIONS = implementations(__name__, "chunk_decode")


def chunk_decode(
    gate_logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    value_state: Tensor,
    key_state: Tensor,
    end_keys: Tensor,
    end_values: Tensor,
    lengths: Tensor,
    longest: int,
    chunk_size: int,
    gate_bias: Tensor | None = None,
    rope_base: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`chunk_scan` and `chunk_attention` for one new token a row (RAT eq. 1-4, arXiv 2507.04416); advances the caches.

    Four arguments change in place: the states become those after the token, and the slot of the token's chunk in the
    caches takes its key and value, until the chunk's last token leaves the end there. There is no gradient.

    Args:
        gate_logits: (B, D) of the new token, any floating dtype.
        q: (B, G, d) queries, not rotated, G dividing H; head h asks with group h mod G.
        k: (B, G * d) keys before the recurrence, tiled over the heads.
        v: (B, D) values before the recurrence.
        value_state: fp32 (B, D), written; emptied first where a row's token opens a chunk.
        key_state: likewise.
        end_keys: (B, H, E, d), written: rotated keys at the last tokens of chunks, chunk c in slot c.
        end_values: (B, H, E, d), written.
        lengths: (B,) int64 tokens that each row has seen before this one.
        longest: no row has seen more; a plain int, so that no shape waits for the device. E > longest // L.
        chunk_size: L >= 1.
        gate_bias: (D,), added in fp32.
        rope_base: rotate q and k by their chunk's index with this base; None for no positions.

    Returns:
        (B, H, d) in v's dtype. In a row's first chunk it is the value after the recurrence itself.

    Raises:
        ValueError: a shape that does not fit, too few slots, or an argument that waits for a gradient.
    """
    tensors = (gate_logits, q, k, v, value_state, key_state, end_keys, end_values)
    _check_shapes(*tensors, gate_bias, lengths)
    _check_numbers(end_keys, longest, chunk_size, rope_base)
    if needs_gradient(*tensors, gate_bias):
        raise ValueError("chunk_decode has no gradient: use chunk_scan and chunk_attention, or torch.no_grad()")
    run = select(_IMPLEMENTATIONS, backend, v)
    return run(*tensors, gate_bias, lengths, longest, chunk_size, rope_base)


def _check_shapes(
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
) -> None:
    if v.ndim != 2 or 0 in v.shape:
        raise ValueError(f"v must be (B, D) with B, D >= 1, got {tuple(v.shape)}")
    batch, width = v.shape
    if q.ndim != 3 or 0 in q.shape or q.shape[0] != batch or width % (q.shape[1] * q.shape[2]):
        raise ValueError(f"q must be ({batch}, G, d) with G * d dividing {width}, got {tuple(q.shape)}")
    groups, d_head = q.shape[1:]
    slots = end_keys.shape[2] if end_keys.ndim == 4 else 1
    cache = (batch, width // d_head, slots, d_head)
    for name, x, shape in (
        ("gate_logits", gate_logits, (batch, width)),
        ("k", k, (batch, groups * d_head)),
        ("value_state", value_state, (batch, width)),
        ("key_state", key_state, (batch, width)),
        ("end_keys", end_keys, cache),
        ("end_values", end_values, cache),
        ("gate_bias", gate_bias, (width,)),
        ("lengths", lengths, (batch,)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def _check_numbers(end_keys: Tensor, longest: int, chunk_size: int, rope_base: float | None) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if longest < 0:
        raise ValueError(f"longest must be at least 0, got {longest}")
    slots, d_head = end_keys.shape[2:]
    needed = longest // chunk_size + 1
    if slots < needed:
        raise ValueError(f"rows of {longest} tokens need {needed} slots for chunk ends of {chunk_size}, got {slots}")
    if rope_base is not None and d_head % 2:
        raise ValueError(f"rotary positions need an even head width, got {d_head}")
