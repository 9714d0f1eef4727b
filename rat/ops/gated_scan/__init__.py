"""The gated linear recurrence over a whole sequence: the mixer of the RNN backbone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rat.ops.backend import Backend, implementations, select
from rat.ops.documents import check_documents, document_starts

Streams = tuple[Tensor, ...]
_IMPLEMENTATIONS = implementations(__name__, "gated_scan")


def gated_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    *,
    gate_bias: Tensor | None = None,
    initial_state: Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Streams, Streams]:
    """Run s_t = g_t * s_{t-1} + (1 - g_t) * y_t, with g = sigmoid(gate_logits + gate_bias) in fp32.

    All streams share one gate; a stream narrower than the gate is tiled over it (channel j of the gate reads
    channel j mod width), which is how RAT's grouped keys meet their heads. RAT eq. 1, arXiv 2507.04416.

    Args:
        gate_logits: (B, T, D), any floating dtype, T >= 1.
        streams: the y of each recurrence, (B, T, D_i) with D_i dividing D.
        gate_bias: (D,), added in fp32.
        initial_state: fp32 (B, D) for each stream: the state before the first token (default: zero).
        lengths: (B,) valid tokens of each row; later ones leave the state as it is and their outputs are
            meaningless.
        document_ids: (B, T); the state is emptied at each document's first token. The first document of a row
            goes on from `initial_state`, where one is given.

    Returns:
        The states at every token, (B, T, D) in each stream's dtype, and after the last one, fp32 (B, D).
    """
    check_scan(gate_logits, streams, gate_bias, initial_state, lengths, document_ids)
    restart = None
    if document_ids is not None:
        restart = document_starts(document_ids)
        restart[:, 0] = initial_state is None
    run = select(_IMPLEMENTATIONS, backend, gate_logits)
    frozen = past_the_end(lengths, gate_logits)
    return run(gate_logits, streams, gate_bias, initial_state, restart, frozen)


def past_the_end(lengths: Tensor | None, gate_logits: Tensor) -> Tensor | None:
    """True at the tokens past each row's length; (B,) -> (B, T) bool."""
    if lengths is None:
        return None
    return torch.arange(gate_logits.shape[1], device=gate_logits.device) >= lengths[:, None]


def check_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    lengths: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    """Raise one ValueError that names the argument of a scan that does not fit."""
    if gate_logits.ndim != 3 or 0 in gate_logits.shape:
        raise ValueError(f"gate_logits must be (B, T, D) with B, T, D >= 1, got {tuple(gate_logits.shape)}")
    batch, length, width = gate_logits.shape
    if not streams:
        raise ValueError("a scan needs at least one stream")
    for i, y in enumerate(streams):
        if y.ndim != 3 or y.shape[:2] != (batch, length) or y.shape[2] == 0 or width % y.shape[2]:
            raise ValueError(f"stream {i} must be ({batch}, {length}, a divisor of {width}), got {tuple(y.shape)}")
    if gate_bias is not None and gate_bias.shape != (width,):
        raise ValueError(f"gate_bias must be ({width},), got {tuple(gate_bias.shape)}")
    if initial_state is not None and [s.shape for s in initial_state] != [(batch, width)] * len(streams):
        shapes = [tuple(s.shape) for s in initial_state]
        raise ValueError(f"initial_state must be {len(streams)} of ({batch}, {width}), got {shapes}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths must be ({batch},), got {tuple(lengths.shape)}")
    check_documents(document_ids, batch, length)
