"""Floors against sums made by hand: D 8, heads of 4, chunks of 4, fp32, so that D = 8 and every weight has 4 bytes."""

import pytest
import torch

from rat import ModelConfig
from rat.benchmarks.floors import Work, state_bytes, work
from rat.benchmarks.timing import Rates
from rat.config import MixerName
from rat.layers import Mixer
from rat.model import MIXERS


def make(name: MixerName, dtype: torch.dtype = torch.float32) -> Mixer:
    config = ModelConfig(
        vocab_size=1, d_model=8, num_layers=1, num_heads=2, num_groups=1, chunk_size=4, window_size=6, pattern=[name]
    )
    return MIXERS[name](config).to(dtype)


def test_training_attention() -> None:
    # 2 rows of 16 tokens; a token costs 8 D^2 + 2 T D; 4 D^2 weights
    found = work(make("attention"), "train", 2, 16)
    assert found.flops == 3 * 2 * 16 * (8 * 64 + 2 * 16 * 8)
    # the weights and their gradients, x and y and theirs
    assert found.num_bytes == 4 * (2 * 4 * 64 + 4 * 2 * 16 * 8)


def test_prefill_of_rat_writes_its_state() -> None:
    # 18 tokens are five chunks; z, v, g of 8 and q, k of 4 channels, the output projection, the gate's bias
    found = work(make("rat"), "prefill", 2, 18)
    assert found.flops == 2 * 18 * (2 * (32 + 8) * 8 + 2 * 18 * 8 // 4)
    weights, x, state = (32 + 8) * 8 + 8, 2 * 18 * 8, 2 * (2 * 5 * 8 + 2 * 8)
    assert found.num_bytes == 4 * (weights + 2 * x + state)


def test_decoding_reads_weights_and_state() -> None:
    attention = work(make("attention", torch.bfloat16), "decode", 3, 16)
    assert attention.flops == 3 * (8 * 64 + 4 * 16 * 8), "the token at position T sees all T keys"
    assert attention.num_bytes == 2 * (4 * 64 + 3 * (2 * 8 + 2 * 16 * 8 + 2 * 8))
    rat = work(make("rat", torch.bfloat16), "decode", 3, 16)
    weights, ends, recurrence = (32 + 8) * 8 + 8, 2 * 4 * 8, 2 * 8
    assert rat.num_bytes == 2 * weights + 3 * (2 * (2 * 8 + ends + 2 * 8) + 4 * 2 * recurrence), "recurrences are fp32"
    rnn = work(make("rnn", torch.bfloat16), "decode", 3, 16)
    assert rnn.num_bytes == 2 * (4 * 64 + 8) + 3 * (2 * 2 * 8 + 4 * 2 * 8), "read and written, and no cache"


def test_a_window_that_is_not_full_yet_is_not_read() -> None:
    layer = make("sliding_window")
    assert [state_bytes(layer, length) for length in (3, 7, 20)] == [4 * 2 * n * 8 for n in (3, 7, 7)]


@pytest.mark.parametrize(
    ("flops", "num_bytes", "seconds", "limit"), [(600, 50, 6, "arithmetic"), (100, 50, 5, "bytes")]
)
def test_the_larger_time_is_the_floor(flops: int, num_bytes: int, seconds: float, limit: str) -> None:
    assert Work(flops=flops, num_bytes=num_bytes).floor(Rates(100.0, 10.0)) == (seconds, limit)
