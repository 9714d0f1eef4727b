"""The gate on what a mixer puts out."""

from torch import Tensor

from rat.ops.backend import Backend, implementations, select

_IMPLEMENTATIONS = implementations(__name__, "output_gate")


def output_gate(gate_logits: Tensor, x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """sigmoid(gate_logits) * x, the last step of a RAT layer before its output projection (arXiv 2507.04416).

    Nothing but the inputs is kept for the backward.

    Args:
        gate_logits: (B, T, D), z of the layer.
        x: (B, T, D), what the heads put out, side by side.

    Returns:
        (B, T, D) in the dtype of x.
    """
    if gate_logits.shape != x.shape or x.ndim != 3:
        raise ValueError(f"gate_logits and x must be (B, T, D) alike, got {tuple(gate_logits.shape)}, {tuple(x.shape)}")
    return select(_IMPLEMENTATIONS, backend, x)(gate_logits, x)
