"""What a config costs, before it is trained: parameters, FLOPs, cache and memory. Nothing is allocated."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rat import CausalLM, ModelConfig
from rat_cli.lightning import RatCLI

_GIB = 2**30
# Bytes for each parameter in training: weight, gradient and AdamW's two means, all fp32.
_TRAINING_BYTES = 16


class InfoCLI(RatCLI):
    """Reads what fit reads, and makes nothing of it."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False, parser_kwargs={"prog": "cli.py info"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is asked of the config."""
        parser.add_argument("--seq_len", type=list[int] | None, default=None, help="lengths to tell costs at")
        parser.add_argument("--ckpt_path", default=None, help="not looked at: whatever a config for fit may hold")
        parser.add_argument("--batch_size", type=int | None, default=None, help="micro batch; default: the data's")

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


def main(args: Sequence[str]) -> None:
    """Print what the config that `args` describe costs; they are those of fit, and --seq_len and --batch_size."""
    config = InfoCLI(args).config
    model = ModelConfig(**config.model.model.as_dict())
    lengths = config.seq_len or sorted({1024, model.max_seq_len, 4 * model.max_seq_len, 32768})
    data = (config.data or {}).get("init_args") or {}
    for line in describe(
        model,
        lengths,
        batch_size=config.batch_size or data.get("batch_size") or 1,
        train_len=data.get("seq_len") or model.max_seq_len,
        bf16="bf16" in str(config.trainer.precision),
        checkpointing=config.model.activation_checkpointing,
    ):
        print(line)


def describe(
    config: ModelConfig, lengths: Sequence[int], *, batch_size: int, train_len: int, bf16: bool, checkpointing: bool
) -> Iterator[str]:
    """The lines of the table.

    Args:
        config: of the model.
        lengths: sequence lengths to tell FLOPs and cache at, in tokens.
        batch_size: sequences a device trains on at once.
        train_len: their length.
        bf16: whether products run in bf16 (weights stay fp32).
        checkpointing: whether only the blocks' inputs are kept for the backward.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    total = model.num_parameters()
    kinds = Counter(config.layer_names())
    yield f"{' + '.join(kinds)}: {config.num_layers} layers, D {config.d_model}, {config.num_heads} heads"
    yield ""
    yield f"{'parameters':<34}{total:>18,}"
    yield f"{'  embedding, tied with the head':<34}{model.embedding.weight.numel():>18,}"
    for kind, count in kinds.items():
        block = model.layers[config.layer_names().index(kind)]
        size = sum(p.numel() for p in block.parameters())
        yield f"{f'  {count} x {kind}, each':<34}{size:>18,}"
    yield ""
    yield f"{'at length':<12}{'forward FLOPs':>22}{'train step FLOPs':>22}{'decoding cache (bf16)':>28}"
    yield f"{'':<12}{'of a token':>22}{'of a token':>22}{'of a sequence, bytes':>28}"
    for length in lengths:
        flops = model.flops_per_token(length)
        yield f"{length:<12,}{flops:>22,}{3 * flops:>22,}{model.cache_bytes(length):>28,}"
    yield ""
    kept = activation_bytes(config, batch_size, train_len, bf16)
    if checkpointing:
        kept = kept // config.num_layers + 4 * batch_size * train_len * config.d_model * config.num_layers
    state = _TRAINING_BYTES * total
    yield f"training memory of a device that shards nothing, {batch_size} x {train_len:,} tokens, without workspace"
    yield f"{'  weights, gradients, AdamW (fp32)':<34}{state / _GIB:>14.2f} GiB"
    yield f"{'  kept for the backward':<34}{kept / _GIB:>14.2f} GiB" + ("  (recomputed)" if checkpointing else "")
    yield f"{'  together':<34}{(state + kept) / _GIB:>14.2f} GiB"
    cache = batch_size * model.cache_bytes(train_len)
    yield f"inference memory in bf16 (estimate), {batch_size} x {train_len:,} tokens, without activations"
    yield f"{'  weights':<34}{2 * total / _GIB:>14.2f} GiB"
    yield f"{'  cache':<34}{cache / _GIB:>14.2f} GiB"


def activation_bytes(config: ModelConfig, batch_size: int, seq_len: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass for its backward, counted on tensors without content."""
    kept: dict[int, Tensor] = {}
    with FakeTensorMode():
        model = CausalLM(config)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(x: Tensor) -> Tensor:
            kept.setdefault(x.untyped_storage()._cdata, x)
            return x

        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        hooks: Any = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(ids, ids)
    return sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in weights)
