"""The gated linear recurrence, one token at a time (RAT, eq. 1; arXiv 2507.04416)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_scan(
    gate_logits: Tensor,
    streams: Sequence[Tensor],
    gate_bias: Tensor | None,
    initial_state: Sequence[Tensor] | None,
    restart: Tensor | None,
    frozen: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """s_t = g_t * s_{t-1} + (1 - g_t) * y_t with g = sigmoid(logits + bias); shapes as in the public function.

    `restart` (B, T) empties the state before a token; `frozen` (B, T) makes a token leave it as it is.
    """
    wide = torch.promote_types(gate_logits.dtype, torch.float32)
    logits = gate_logits.to(wide) + (0 if gate_bias is None else gate_bias.to(wide))
    gate = torch.sigmoid(logits)
    batch, length, width = gate.shape
    outputs, finals = [], []
    for i, y in enumerate(streams):
        y_tiled = y.to(wide).tile(1, 1, width // y.shape[-1])
        state = gate.new_zeros(batch, width) if initial_state is None else initial_state[i].to(wide)
        trace = []
        for t in range(length):
            before = state
            if restart is not None:
                state = torch.where(restart[:, t, None], 0.0, state)
            state = gate[:, t] * state + (1 - gate[:, t]) * y_tiled[:, t]
            if frozen is not None:
                state = torch.where(frozen[:, t, None], before, state)
            trace.append(state)
        outputs.append(torch.stack(trace, dim=1).to(y.dtype))
        finals.append(state)
    return tuple(outputs), tuple(finals)
