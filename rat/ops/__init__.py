"""Pure functions on tensors. Each comes as a reference and a portable version behind one public function."""

from rat.ops.backend import BACKENDS, Backend, get_backend, set_backend, use_backend
from rat.ops.chunk_attention import chunk_attention, chunk_attention_weights
from rat.ops.chunk_decode import chunk_decode
from rat.ops.chunk_scan import chunk_scan
from rat.ops.gated_scan import gated_scan
from rat.ops.linear import linear
from rat.ops.output_gate import output_gate
from rat.ops.rotary import rotary
from rat.ops.sliding_window import sliding_window_attention

__all__ = [
    "BACKENDS",
    "Backend",
    "chunk_attention",
    "chunk_attention_weights",
    "chunk_decode",
    "chunk_scan",
    "gated_scan",
    "get_backend",
    "linear",
    "output_gate",
    "rotary",
    "set_backend",
    "sliding_window_attention",
    "use_backend",
]
