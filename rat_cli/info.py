"""What a config costs, before it is trained: parameters, FLOPs, cache, memory, GPU-hours. Nothing is allocated."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser

from rat import CausalLM, ModelConfig
from rat.context_parallel import bytes_per_token, ring_attention_bytes_per_token
from rat.memory import TrainingMemory
from rat_cli.lightning import RatCLI
from rat_cli.plan import GB, Plan, read_plan

STRATEGIES = Path(__file__).parents[1] / "configs" / "strategy"
# Parts of a device's memory as they are printed.
PARTS = {
    "weights": "weights (fp32)",
    "gradients": "gradients (fp32)",
    "optimizer": "AdamW (fp32)",
    "activations": "kept for the backward",
    "loss": "logits and loss",
    "temporary": "temporary",
    "gathered": "gathered weights and gradients",
    "communication": "being sent",
}


class InfoCLI(RatCLI):
    """Reads what fit reads, and makes nothing of it; `prog` is the command that errors name."""

    def __init__(self, args: Sequence[str], prog: str = "cli.py info") -> None:
        super().__init__(list(_named_strategies(args)), run=False, parser_kwargs={"prog": prog})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is asked of the config."""
        parser.add_argument("--seq_len", type=list[int] | None, default=None, help="lengths to tell costs at")
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", default=None, help="not looked at: whatever a run's config.yaml may hold")
        parser.add_argument("--batch_size", type=int | None, default=None, help="micro batch; default: the data's")
        parser.add_argument("--devices", type=int | None, default=None, help="of all nodes; default: the trainer's")
        parser.add_argument("--strategy", help="NAME: as --config configs/strategy/NAME.yaml; default: the trainer's")
        parser.add_argument("--device_memory_gb", type=float, default=80.0, help="memory of a device, in 10^9 bytes")
        parser.add_argument(
            "--peak_tflops", type=float, default=989.0, help="of a device; default: an H100's in bf16, without sparsity"
        )
        parser.add_argument("--mfu", type=float, default=0.4, help="share of it that is reached: an assumption")

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


def _named_strategies(args: Sequence[str]) -> Iterator[str]:
    """`args` with --strategy NAME as the file that it stands for. Raises ValueError where there is none."""
    rest = iter(args)
    for arg in rest:
        option, equals, name = arg.partition("=")
        if option != "--strategy":
            yield arg
            continue
        name = name if equals else next(rest, "")
        known = sorted(path.stem for path in STRATEGIES.glob("*.yaml"))
        if name not in known:
            raise ValueError(f"there is no strategy {name!r}: choose one of {', '.join(known)}")
        yield from ("--config", str(STRATEGIES / f"{name}.yaml"))


def main(args: Sequence[str]) -> None:
    """Print what the config that `args` describe costs; they are those of fit and of `InfoCLI`."""
    config = InfoCLI(args).config
    for name in ("device_memory_gb", "peak_tflops", "mfu"):
        if not config[name] > 0:
            raise ValueError(f"{name} must be above 0, got {config[name]}")
    plan = read_plan(config, config.batch_size, config.devices)
    lengths = config.seq_len or sorted({1024, plan.model.max_seq_len, 4 * plan.model.max_seq_len, 32768})
    for line in describe_model(plan.model, lengths):
        print(line)
    for line in describe_training(plan, config.device_memory_gb, config.peak_tflops, config.mfu):
        print(line, flush=True)


def describe_model(config: ModelConfig, lengths: Sequence[int]) -> Iterator[str]:
    """Parameters, and FLOPs and cache at sequences of these lengths in tokens."""
    with torch.device("meta"):
        model = CausalLM(config)
    kinds = Counter(config.layer_names())
    yield f"{' + '.join(kinds)}: {config.num_layers} layers, D {config.d_model}, {config.num_heads} heads"
    yield ""
    yield f"{'parameters':<34}{model.num_parameters():>18,}"
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


def describe_training(plan: Plan, memory_gb: float, peak_tflops: float, mfu: float) -> Iterator[str]:
    """Memory of a device, the largest micro batch on `memory_gb`, the cost of the run."""
    step, many = plan.step, f"each of {plan.devices} devices" if plan.devices > 1 else "the device"
    place = "GPU" if step.gpu else "CPU"
    again = ", blocks computed again for the backward" if step.checkpointing else ""
    yield ""
    yield f"training memory of {many} ({place}, {plan.strategy}), {step.batch_size} x {step.seq_len:,} tokens{again}"
    yield from _describe_sharing(plan)
    yield from _table(plan.memory())
    batch, memory = plan.largest_batch(memory_gb)
    micro_batches = plan.global_batch_size // batch // plan.data_parallel
    yield (
        f"largest micro batch in {memory_gb:g} GB: {batch} ({memory.total / GB:.2f} GB),"
        f" {micro_batches} of them in a step of {plan.global_batch_size}"
    )
    yield ""
    flops = plan.flops()
    if flops is None:
        yield "cost of the run: its length is the data's; --trainer.max_steps N tells that of N optimiser steps"
        return
    hours = gpu_hours(flops, peak_tflops, mfu)
    tokens = step.seq_len * plan.global_batch_size * (plan.max_steps or 0)
    yield f"cost of the run: {tokens:.4g} tokens, {flops:.4g} FLOPs"
    yield (
        f"  {hours:,.3g} device-hours, {hours / plan.devices:,.3g} hours on {plan.devices},"
        f" if {mfu:.0%} of {peak_tflops:g} TFLOP/s are reached (an assumption)"
    )


def _describe_sharing(plan: Plan) -> Iterator[str]:
    """Which devices share rows and layers, and what those that share a row send each other."""
    sharding, step = plan.step.sharding, plan.step
    if sharding is None:
        return
    if sharding.tensor_parallel > 1:
        yield f"  {sharding.tensor_parallel} devices share a layer"
    if (ranks := sharding.context_parallel) > 1:
        size = 2 if step.bf16 else 4
        sent = bytes_per_token(plan.model, step.seq_len, ranks, size) * (1.5 if step.checkpointing else 1)
        ring = ring_attention_bytes_per_token(plan.model, ranks, size)
        yield f"  {ranks} devices share a row, of which this one has the last tokens; in a step they send"
        yield f"  {sent / 1024:,.4g} KiB for each token of a row (ring attention in all layers: {ring / 1024:,.4g} KiB)"


def gpu_hours(flops: float, peak_tflops: float, mfu: float) -> float:
    """Hours of one device that reaches the share `mfu` of its peak."""
    return flops / (peak_tflops * 1e12 * mfu) / 3600


def _table(memory: TrainingMemory) -> Iterator[str]:
    for part, title in PARTS.items():
        if count := getattr(memory, part):
            yield f"{'  ' + title:<34}{count / GB:>14.2f} GB"
    yield f"{'  together, at the fullest moment':<34}{memory.total / GB:>14.2f} GB"
