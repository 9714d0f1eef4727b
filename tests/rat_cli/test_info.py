"""info prints what the model's own methods say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rat import CausalLM, ModelConfig
from rat_cli.info import activation_bytes
from rat_cli.lightning import RatCLI

Cli = Callable[..., Any]
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [["quickstart.yaml"], *(["quickstart.yaml", f"backbone/{p.name}"] for p in (CONFIGS / "backbone").iterdir())]
XL = [[str(p.relative_to(CONFIGS))] for p in sorted((CONFIGS / "experiment/fineweb_edu").glob("*-xl.yaml"))]
WHOLE = [files for files in SMALL + XL if "base-xl" not in files[0]]


@pytest.mark.parametrize("files", WHOLE, ids=" ".join)
def test_info_prints_what_the_model_says(cli: Cli, files: list[str]) -> None:
    options = [option for file in files for option in ("--config", CONFIGS / file)]
    # cheap activations: they are counted in another test
    result = cli("info", *options, "--batch_size", "1", "--data.init_args.seq_len", "16", "--seq_len", "[1024, 5000]")
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
    state = next(row for row in rows if row[:2] == ["weights", "gradients"])
    assert float(state[-2]) == pytest.approx(16 * model.num_parameters() / 2**30, abs=0.006)


def test_activations_are_what_autograd_keeps() -> None:
    config = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, chunk_size=4, max_seq_len=32)
    model, kept = CausalLM(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.zeros(3, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(ids, ids)
    bytes_kept = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)
    assert activation_bytes(config, 3, 32, bf16=False) == pytest.approx(bytes_kept, rel=0.02)


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
