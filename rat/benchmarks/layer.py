"""Train step of one mixing layer: RAT beside attention, and each beside its arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from rat.benchmarks.timing import gemm_rate, interleaved, machine
from rat.config import MixerName, ModelConfig
from rat.initialization import initialize
from rat.layers import Mixer
from rat.model import MIXERS

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """One cell of the table: forward and backward of one layer, once."""

    seq_len: int
    mixer: str
    milliseconds: float
    floor_milliseconds: float
    speedup: float


def layer_benchmark(
    seq_lens: Sequence[int] = (1024, 4096, 32768),
    mixers: Sequence[MixerName] = ("attention", "rat"),
    d_model: int = 512,
    d_head: int = 128,
    chunk_size: int = 16,
    num_groups: int = 2,
    batch_size: int = 1,
    dtype: Dtype = "float32",
    repeats: int = 5,
    device: str = "cpu",
) -> list[LayerTiming]:
    """Time the train step (forward and backward) of single layers, the mixers taking turns, and print the table.

    `floor` is the time that the layer's FLOPs (cost model, backward counted twice) take at the matrix-product rate
    measured in the same run; `speedup` is against the first mixer.

    Args:
        seq_lens: T of each row of the table, in tokens.
        mixers: the layers to compare; the first one is the yardstick.
        d_model: D.
        d_head: d; the layer has D / d heads.
        chunk_size: L of RAT.
        num_groups: G of RAT.
        batch_size: rows of T tokens.
        dtype: of weights and activations.
        repeats: rounds whose median is taken, after one that warms up.
        device: cpu, cuda or cuda:N.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    config = ModelConfig(
        vocab_size=1,
        d_model=d_model,
        num_layers=len(mixers),
        num_heads=d_model // d_head,
        pattern=tuple(mixers),
        chunk_size=chunk_size,
        num_groups=num_groups,
    )
    layers: dict[str, Mixer] = {name: MIXERS[name](config) for name in mixers}
    for layer in layers.values():
        initialize(layer, config.init_std)
        layer.to(where, kind)
    rate = gemm_rate(kind, where)
    print(f"{machine(where)}; {dtype}, D {d_model}, d {d_head}, L {chunk_size}, batch {batch_size};")
    print(f"matrix products at {rate / 1e9:.0f} GFLOP/s; medians of {repeats} interleaved rounds")
    print(f"{'T':>7}  {'layer':<16}{'ms':>10}{'floor ms':>10}{'ms/floor':>10}{'speedup':>9}", flush=True)
    table = []
    for seq_len in seq_lens:
        x = torch.randn(batch_size, seq_len, d_model, device=where).to(kind).requires_grad_()
        steps = {name: partial(_train_step, layer, x) for name, layer in layers.items()}
        seconds = interleaved(steps, repeats, where)
        for name, layer in layers.items():
            floor = 3 * layer.flops_per_token(seq_len) * batch_size * seq_len / rate
            row = LayerTiming(
                seq_len=seq_len,
                mixer=name,
                milliseconds=1e3 * seconds[name],
                floor_milliseconds=1e3 * floor,
                speedup=seconds[mixers[0]] / seconds[name],
            )
            table.append(row)
            print(
                f"{seq_len:>7}  {name:<16}{row.milliseconds:>10.1f}{row.floor_milliseconds:>10.1f}"
                f"{row.milliseconds / row.floor_milliseconds:>10.2f}{row.speedup:>8.2f}x",
                flush=True,
            )
    return table


def _train_step(layer: Mixer, x: torch.Tensor) -> None:
    """Forward and backward; the gradients are dropped."""
    layer(x).sum().backward()
    layer.zero_grad()
    x.grad = None
