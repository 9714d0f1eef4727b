"""nn.Modules: the mixers and what stands around them."""

from rat.layers.attention import Attention, SlidingWindowAttention
from rat.layers.block import Block
from rat.layers.context_shard import ContextShard
from rat.layers.feed_forward import FeedForward
from rat.layers.mixer import GatedMixer, Mixer
from rat.layers.rat import RAT
from rat.layers.rnn import RNN
from rat.layers.state import LayerState

__all__ = [
    "RAT",
    "RNN",
    "Attention",
    "Block",
    "ContextShard",
    "FeedForward",
    "GatedMixer",
    "LayerState",
    "Mixer",
    "SlidingWindowAttention",
]
