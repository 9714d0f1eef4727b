"""What context parallelism sends between ranks, beside what ring attention would."""

import torch

from rat.config import ModelConfig
from rat.layers.context_shard import ContextShard, deal
from rat.model import MIXERS


def bytes_per_token(config: ModelConfig, seq_len: int, num_ranks: int, bytes_per_element: int = 2) -> float:
    """Bytes that all ranks together send in a training step, for each token of a row; the same backward as forward.

    A RAT layer sends each chunk's end, 2 D numbers, to all later ranks, of which there are (R - 1) / 2 on average:
    forward and backward together 2 (R - 1) D / L numbers a token, whatever T is. An attention layer is the same with
    L = 1, a sliding-window layer sends (R - 1) W keys and values in all (fewer where T is short), the RNN R (R - 1) / 2
    times two vectors. The sum of the loss, two numbers, is left out; activation checkpointing sends what goes
    forward once more.

    Args:
        config: of the model.
        seq_len: T of a whole row.
        num_ranks: R, the ranks that share it.
        bytes_per_element: of keys and values: 2 under bf16 autocast. The RNN's states are fp32 whatever it is.
    """
    shard = ContextShard(deal(seq_len, config.chunk_size if "rat" in config.pattern else 1, num_ranks), rank=0)
    with torch.device("meta"):
        mixers = [MIXERS[name](config) for name in config.layer_names()]
    return 2 * sum(mixer.sent_bytes(shard, bytes_per_element) for mixer in mixers) / seq_len


def ring_attention_bytes_per_token(config: ModelConfig, num_ranks: int, bytes_per_element: int = 2) -> float:
    """What ring attention (arXiv 2310.01889) sends in a training step if every layer is attention, for each token.

    Keys and values, 2 D numbers a token, go once around the ring forward, R - 1 hops; backward they go again, with
    their gradients: 6 (R - 1) D numbers a token and layer, 3 L times those of RAT.
    """
    return 6 * (num_ranks - 1) * config.d_model * config.num_layers * bytes_per_element
