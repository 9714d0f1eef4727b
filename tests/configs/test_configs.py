"""Every shipped YAML, found by globbing, through the real CLI classes; the paper's numbers; the small ones train.

Data paths need no substitute to build a data module, which opens nothing. The small configs run in a folder in which
data/docstrings, the path that they name, is a copy of the random shards.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from datamodules.resumable import ResumableDataModule
from datamodules.sft.datamodule import SFTDataModule
from lightning_modules import FSDP2Strategy, FSDPStrategy, LanguageModel, OptimizerConfig
from lightning_modules.schedule import accumulation
from rat import CausalLM, ModelConfig
from rat.benchmarks.kernel_cases import SHIPPED
from rat.layers import Block
from rat_cli.lightning import RatCLI
from rat_cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART, XL = "quickstart.yaml", "experiment/fineweb_edu/rat-xl.yaml"
SWEEPS = {path for path in CONFIGS.glob("ablation/*.yaml") if path.name != "language.yaml"}  # see test_sweeps.py
ALL = sorted(str(path.relative_to(CONFIGS)) for path in {*CONFIGS.rglob("*.yaml")} - SWEEPS)
BASES = [name for name in ALL if Path(name).name.startswith("base-")]
FOLDERS = ("experiment/", "synthetic/", "ablation/")
WHOLE = [name for name in ALL if name == QUICKSTART or (name.startswith(FOLDERS) and name not in BASES)]
BACKBONES = [name for name in ALL if name.startswith("backbone/")]
EXTRAS = [name for name in ALL if name not in [*WHOLE, *BASES, *BACKBONES]]
SMALL = [[QUICKSTART], *([QUICKSTART, name] for name in BACKBONES)]
LAYERED = [*([name] for name in WHOLE), *SMALL[1:], *([under, name] for name in EXTRAS for under in (QUICKSTART, XL))]
# of the paper's models, in billions
SIZES = {"attention": 1.274, "rat": 1.299, "rat-swa": 1.286, "attention-swa": 1.274, "rnn": 1.274}
PATTERNS = {
    "attention": ["attention"],
    "rat": ["rat"],
    "rat-swa": ["rat", "sliding_window"],
    "attention-swa": ["attention", "sliding_window"],
    "rnn": ["rnn"],
}


class Parts(RatCLI):
    """All that a config describes, and what the Trainer would be given."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        return config


def options(files: list[str]) -> list[str]:
    return [text for name in files for text in ("--config", str(CONFIGS / name))]


def parts(*files: str) -> Parts:
    return Parts(options(list(files)), run=False)


def small_model(files: list[str]) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(parts(*files).model.config)


def ids(files: list[str]) -> str:
    return " + ".join(files)


@pytest.mark.parametrize("files", LAYERED, ids=ids)
def test_every_config_makes_its_model_data_and_trainer(files: list[str]) -> None:
    made = parts(*files)
    assert isinstance(made.model, LanguageModel)
    assert isinstance(made.datamodule, ResumableDataModule)
    assert made.datamodule.seq_len == made.model.config.max_seq_len
    assert all(isinstance(callback, Callback) for callback in made.trainer["callbacks"])
    if not isinstance(made.trainer["strategy"], FSDPStrategy):  # which Lightning refuses to give to a CPU
        assert isinstance(RatCLI(options(files), run=False).trainer, Trainer)
    with torch.device("meta"):
        made.model.init_from = None
        made.model.configure_model()
    assert accumulation(made.model.global_batch_size, made.datamodule.batch_size, 1) >= 1


def test_every_base_is_used() -> None:
    used = {
        (CONFIGS / name).parent.joinpath(base).resolve()
        for name in ALL
        if (base := yaml.safe_load((CONFIGS / name).read_text()).get("base"))
    }
    assert used >= {CONFIGS / name for name in BASES}


def test_strategies_are_what_they_are_called() -> None:
    def strategy(name: str, *, under: str = QUICKSTART) -> Any:
        return RatCLI(options([under, f"strategy/{name}.yaml"]), run=False).trainer.strategy

    assert type(strategy("single")) is SingleDeviceStrategy
    assert type(strategy("ddp")) is DDPStrategy
    sizes = {"fsdp2": (1, 1), "context_parallel": (2, 1), "tensor_parallel": (1, 2)}
    for name, size in sizes.items():
        assert type(strategy(name)) is FSDP2Strategy
        assert (strategy(name).context_parallel_size, strategy(name).tensor_parallel_size) == size
    fsdp = parts(XL, "strategy/fsdp.yaml").trainer["strategy"]
    assert type(fsdp) is FSDPStrategy
    assert fsdp.sharding_strategy.name == "FULL_SHARD"
    assert fsdp._state_dict_type == "sharded"
    assert fsdp.kwargs["auto_wrap_policy"]._module_classes == {Block}
    assert fsdp._activation_checkpointing_kwargs["auto_wrap_policy"]._module_classes == {Block}
    assert (fsdp.mixed_precision.param_dtype, fsdp.mixed_precision.reduce_dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        strategy("fsdp")


@pytest.mark.parametrize("name", [name for name in EXTRAS if name.startswith("kernel/")])
def test_kernels_are_what_they_are_called(name: str) -> None:
    assert parts(QUICKSTART, name).model.kernel_backend == Path(name).stem


# ablations are sized for two cores
@pytest.mark.parametrize("files", [*([name] for name in WHOLE if "ablation" not in name), *SMALL[1:]], ids=ids)
def test_the_kernels_are_compiled_for_every_config(files: list[str]) -> None:
    made = parts(*files)
    model, precision = made.model.config, made.trainer["precision"]
    dtype = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32}[precision]
    for shape, dtypes in SHIPPED.values():
        sizes = (shape.d_model, shape.num_heads, shape.chunk_size, shape.num_groups, shape.window_size)
        if sizes == (model.d_model, model.num_heads, model.chunk_size, model.num_groups, model.window_size):
            assert {dtype, torch.float32} <= set(dtypes)
            return
    pytest.fail(f"rat.benchmarks.kernel_cases.SHIPPED has no layer of {model}")


@pytest.mark.parametrize("task", ["fineweb_edu", "sft"])
@pytest.mark.parametrize("name", SIZES)
def test_the_papers_models(task: str, name: str) -> None:
    made = parts(f"experiment/{task}/{name}-xl.yaml")
    assert made.model.config == ModelConfig(
        vocab_size=32000, d_model=2048, num_layers=24, num_heads=16, pattern=PATTERNS[name], chunk_size=16,
        num_groups=2, window_size=1024, rope_base=10000.0, max_seq_len=4096, norm_eps=1e-6, init_std=0.02,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(made.model.config)
    assert round(model.num_parameters() / 1e9, 3) == SIZES[name]
    assert made.trainer["logger"].version == f"{name}-xl"


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_pre_training(name: str) -> None:
    made = parts(f"experiment/fineweb_edu/{name}-xl.yaml")
    assert made.model.optimizer_config == OptimizerConfig(
        peak_lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1, eta_min=1e-6, warmup_fraction=0.05
    )
    assert made.model.global_batch_size == 512
    assert made.trainer["gradient_clip_val"] == 1.0
    assert made.trainer["gradient_clip_algorithm"] in (None, "norm")
    assert made.trainer["precision"] == "bf16-mixed"
    assert made.trainer["max_steps"] == math.ceil(100e9 / (512 * 4096))
    assert made.trainer["max_epochs"] == -1
    assert made.model.init_from is None
    assert made.datamodule.seq_len == 4096


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_fine_tuning(name: str) -> None:
    made = parts(f"experiment/sft/{name}-xl.yaml")
    assert made.model.optimizer_config == OptimizerConfig(
        peak_lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, eta_min=1e-6, warmup_fraction=0.05
    )
    assert made.model.global_batch_size == 128
    assert (made.trainer["max_steps"], made.trainer["max_epochs"]) == (-1, 1)
    assert made.trainer["gradient_clip_val"] == 1.0
    assert made.trainer["precision"] == "bf16-mixed"
    assert isinstance(made.datamodule, SFTDataModule)
    assert (made.datamodule.seq_len, made.datamodule.chunk_size) == (4096, None)  # padded rows
    # where the pre-training of the same model exports to
    logger = parts(f"experiment/fineweb_edu/{name}-xl.yaml").trainer["logger"]
    assert made.model.init_from == Path(logger.log_dir, "model")


def test_the_small_backbones_are_what_they_are_called() -> None:
    names = [Path(files[-1]).stem for files in SMALL[1:]]
    assert sorted(names) == sorted(SIZES)
    assert {name: list(parts(*files).model.config.pattern) for name, files in zip(names, SMALL[1:], strict=True)} == (
        {name: PATTERNS[name] for name in names}
    )


def test_the_small_backbones_are_of_one_size() -> None:
    sizes = [small_model(files).num_parameters() for files in SMALL]
    assert max(sizes) <= 1.05 * min(sizes), sizes


@pytest.mark.parametrize("files", SMALL, ids=ids)
def test_the_small_configs_train_and_validate(
    files: list[str], random_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(random_shards, tmp_path / "data" / "docstrings")
    (tmp_path / "data" / "docstrings" / "tokenizer.json").touch()
    monkeypatch.chdir(tmp_path)
    steps, losses = [], []
    log = LanguageModel._log_metrics
    monkeypatch.setattr(
        LanguageModel, "_log_metrics",
        lambda self, stage, nll: (steps.append(self.trainer.global_step), losses.append(nll.compute()))
        and log(self, stage, nll),
    )  # fmt: skip
    main(["fit", *options(files), "--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"])
    assert steps == [1]
    # an untrained model knows nothing of 4096 tokens
    assert losses[0] == pytest.approx(math.log(4096), abs=0.7)
