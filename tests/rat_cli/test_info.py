"""info prints what the model's own methods and `rat.memory` say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rat import CausalLM, ModelConfig
from rat.context_parallel import bytes_per_token, ring_attention_bytes_per_token
from rat_cli.info import InfoCLI, gpu_hours
from rat_cli.lightning import RatCLI
from rat_cli.plan import Plan, read_plan

Cli = Callable[..., Any]
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [["quickstart.yaml"], *(["quickstart.yaml", f"backbone/{p.name}"] for p in (CONFIGS / "backbone").iterdir())]
XL = "experiment/fineweb_edu/rat-xl.yaml"


def printed(out: str) -> dict[str, list[str]]:
    """The words of each line, by the line's first word."""
    return {words[0]: words for words in (line.replace(",", "").split() for line in out.splitlines()) if words}


@pytest.mark.parametrize("files", SMALL, ids=" ".join)
def test_info_prints_what_the_model_says(cli: Cli, files: list[str]) -> None:
    options = [option for file in files for option in ("--config", CONFIGS / file)]
    # few tokens and one micro batch, since memory is counted in another test
    few = ("--batch_size", "1", "--model.global_batch_size", "1", "--data.init_args.seq_len", "16")
    result = cli("info", *options, *few, "--seq_len", "[1024, 5000]")
    assert result.code == 0, result.err
    config = yaml.safe_load(cli("fit", *options, "--print_config").out)["model"]["model"]
    with torch.device("meta"):
        model = CausalLM(ModelConfig(**config))
    rows = [line.replace(",", "").split() for line in result.out.splitlines()]
    assert ["parameters", str(model.num_parameters())] in rows
    for length in (1024, 5000):
        flops = model.flops_per_token(length)
        assert [str(n) for n in (length, flops, 3 * flops, model.cache_bytes(length))] in rows
    blocks: dict[str, list[int]] = {}
    for name, layer in zip(model.config.layer_names(), model.layers, strict=True):
        blocks.setdefault(name, []).append(sum(p.numel() for p in layer.parameters()))
    for name, sizes in blocks.items():
        assert [str(len(sizes)), "x", name, "each", str(sizes[0])] in rows
    assert float(printed(result.out)["weights"][-2]) == pytest.approx(4 * model.num_parameters() / 1e9, abs=0.006)


def test_info_tells_the_largest_batch_and_the_cost(cli: Cli, tiny: Path) -> None:
    options = ("--config", tiny, "--devices", "2", "--strategy", "ddp", "--model.global_batch_size", "24")
    plan = read_plan(InfoCLI([str(option) for option in options]).config, devices=2)
    assert (plan.strategy, plan.step.buckets, plan.step.accumulating) == ("ddp", True, True)
    fits = {batch: plan_memory(plan, batch) for batch in (1, 2, 3, 4, 6, 12)}
    assert list(fits.values()) == sorted(fits.values())
    batch, memory = plan.largest_batch((fits[6] - 1) / 1e9)
    assert (batch, memory.total) == (4, fits[4])
    assert plan.largest_batch(fits[6] / 1e9)[0] == 6
    result = cli("info", *options, "--device_memory_gb", fits[4] / 1e9, "--peak_tflops", "1e-6", "--mfu", "0.5")
    assert "each of 2 devices (CPU, ddp), 2 x 16 tokens" in result.out
    assert "GB: 4 (0.00 GB), 3 of them in a step of 24" in result.out
    with torch.device("meta"):
        flops = 2 * 24 * 16 * 3 * CausalLM(plan.model).flops_per_token(16)
    assert plan.flops() == flops
    assert f"{2 * 24 * 16} tokens, {flops:.4g} FLOPs" in result.out
    assert f"{flops / 1e6 / 0.5 / 3600:,.3g} device-hours, {flops / 1e6 / 3600:,.3g} hours on 2" in result.out
    assert gpu_hours(3.6e15, 1.0, 0.5) == 2.0


def plan_memory(plan: Plan, batch: int) -> int:
    return replace(plan, step=replace(plan.step, batch_size=batch, accumulating=True)).memory().total


def read(*options: str, devices: int | None = None) -> Plan:
    return read_plan(InfoCLI(["--config", str(CONFIGS / XL), *options]).config, devices=devices)


def test_strategies_are_read_from_their_files() -> None:
    assert (read().strategy, read().step.sharding, read().step.buckets) == ("single", None, False)
    assert read(devices=16).strategy == "ddp"  # what auto means to Lightning
    assert read("--strategy=ddp", devices=16).step.buckets
    assert read("--strategy", "ddp", "--trainer.devices", "8", "--trainer.num_nodes", "2").devices == 16
    fsdp = read("--strategy", "fsdp", devices=16).step
    assert fsdp.checkpointing
    assert fsdp.sharding is not None
    assert (fsdp.sharding.shards, fsdp.sharding.root_dtype) == (16, torch.bfloat16)
    hybrid = read("--strategy", "fsdp2", "--trainer.strategy.init_args.replicas", "2", devices=16).step
    assert not hybrid.checkpointing
    assert hybrid.sharding is not None
    assert (hybrid.sharding.replicas, hybrid.sharding.shards) == (2, 8)
    assert (hybrid.sharding.param_dtype, hybrid.sharding.root_dtype) == (torch.bfloat16, torch.float32)
    assert hybrid.gpu
    assert hybrid.bf16
    exact = read("--strategy", "fsdp2", "--trainer.precision", "32-true", devices=16).step.sharding
    assert exact is not None
    assert exact.param_dtype == torch.float32


def test_devices_that_share_rows_share_the_global_batch() -> None:
    shared = read("--strategy", "context_parallel", "--trainer.strategy.init_args.tensor_parallel_size=2", devices=16)
    assert shared.step.sharding is not None
    assert (shared.step.sharding.shards, shared.step.sharding.context_parallel) == (8, 2)
    assert (shared.data_parallel, shared.global_batch_size) == (4, 512)
    assert shared.step.accumulating


def test_info_tells_the_traffic_of_rows_that_are_shared(cli: Cli, tiny: Path) -> None:
    options = ("--strategy", "context_parallel", "--devices", "4", "--model.model.chunk_size", "4")
    plan = read_plan(InfoCLI([str(option) for option in ("--config", tiny, *options)]).config, devices=4)
    sent, ring = bytes_per_token(plan.model, 16, 2, 4), ring_attention_bytes_per_token(plan.model, 2, 4)
    assert plan.data_parallel == 2
    result = cli("info", "--config", tiny, *options)
    assert result.code == 0, result.err
    assert f"{sent / 1024:,.4g} KiB for each token of a row (ring attention in all layers: {ring / 1024:,.4g}" in (
        result.out
    )
    again = cli("info", "--config", tiny, *options, "--model.activation_checkpointing", "true")
    assert f"{1.5 * sent / 1024:,.4g} KiB for each token of a row" in again.out


def test_a_run_whose_length_is_the_datas_has_no_cost(cli: Cli, tiny: Path) -> None:
    options = ("--config", tiny, "--trainer.max_steps", "-1", "--trainer.max_epochs", "1")
    assert "its length is the data's" in cli("info", *options).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", "0"), "devices and batch_size must be at least 1, got 0"),
        (("--strategy", "zero3"), "there is no strategy 'zero3': choose one of context_parallel, ddp, fsdp, fsdp2"),
        (("--strategy", "single", "--trainer.strategy", "single_device", "--devices", "2"), "choose --strategy ddp"),
        (("--trainer.strategy", "deepspeed"), "the strategy deepspeed is not counted: choose single, ddp, fsdp"),
        (("--trainer.precision", "bf16-true"), "training in bf16-true is not counted: choose one of 32-true"),
        (("--devices", "3"), "global_batch_size 4 is no multiple of batch_size 2 x 3 devices"),
        (("--device_memory_gb", "1e-6"), "one sequence of 16 tokens takes 0.00 GB of a device, and there are 1e-06"),
        (("--mfu", "0"), "mfu must be above 0, got 0"),
        (("--strategy", "fsdp2", "--trainer.strategy.init_args.replicas", "2"), "2 copies of the model do not divide"),
        (
            ("--strategy", "context_parallel"),
            "context_parallel_size 2 x tensor_parallel_size 1 do not divide 1 devices",
        ),
        (
            ("--strategy", "context_parallel", "--devices", "2", "--model.model.chunk_size", "16"),
            "rows of 16 tokens are 1 chunks of 16, and 2 ranks need one each",
        ),
        (
            ("--strategy", "tensor_parallel", "--devices", "2", "--model.model.num_groups", "1"),
            "2 tensor-parallel ranks do not divide num_groups 1",
        ),
    ],
    ids=str,
)
def test_info_refuses_what_it_cannot_count(cli: Cli, tiny: Path, options: tuple[str, ...], message: str) -> None:
    result = cli("info", "--config", tiny, *options)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_info_makes_nothing(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RatCLI, "_instantiate_trainer", lambda *_: pytest.fail("a Trainer was made"))
    result = cli("info", "--config", tiny, "--data.init_args.path", "nowhere")
    assert result.code == 0
    assert "rat: 2 layers, D 16, 2 heads" in result.out


def test_info_names_mistakes_as_fit_does(cli: Cli, tiny: Path) -> None:
    result = cli("info", "--config", tiny, "--model.model.d_modl", "3")
    assert result.code == 2
    assert "did you mean --model.model.d_model?" in result.err
    result = cli("info", "--config", tiny, "--model.model.d_model", "15")
    assert result.code == 1
    assert result.err == "error: d_model 15 is not divisible by num_heads 2\n"
