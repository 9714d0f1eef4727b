"""An export that loads, throughput by a clock of our own, and histograms by hand."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import throughput_monitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_modules import ExportModel, LanguageModel, LastCheckpoint, MemoryLengthHistogram, Throughput, callbacks
from rat import CausalLM, ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]
Logged = Callable[[str], list[float]]


# --- ExportModel


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}])
def test_the_exported_model_is_the_trained_one(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path, options: dict[str, bool]
) -> None:
    (tmp_path / "some.json").write_text("a tokenizer")
    module = LanguageModel(config, **options)
    trainer = make_trainer(callbacks=ExportModel(tokenizer=tmp_path / "some.json"))
    trainer.fit(module, ragged())
    folder = Path(trainer.log_dir, "model")
    assert (folder / "tokenizer.json").read_text() == "a tokenizer"
    loaded = CausalLM.from_pretrained(folder)
    assert loaded.config == config
    for name, x in module.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], x, rtol=0, atol=0)


def test_the_folder_of_the_export_can_be_chosen(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    make_trainer(callbacks=ExportModel(folder=tmp_path / "there")).fit(LanguageModel(config), ragged())
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"config.json", "model.safetensors"}


def test_a_missing_tokenizer_is_refused_before_training(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=ExportModel(tokenizer=tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        trainer.fit(LanguageModel(config), ragged())
    assert trainer.global_step == 0


def test_a_fast_dev_run_exports_and_saves_nothing(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    options = {"fast_dev_run": 2, "enable_checkpointing": True}
    make_trainer(callbacks=[ExportModel(), LastCheckpoint(1)], **options).fit(LanguageModel(config), ragged())
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("*.ckpt"))


# --- Throughput


@pytest.fixture
def half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for Lightning's monitor that goes on by half a second whenever it is read."""
    now = iter(n / 2 for n in range(10**6))
    monkeypatch.setattr(throughput_monitor, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))


@pytest.mark.usefixtures("half_seconds")
def test_throughput_is_in_tokens_and_model_flops(
    config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(callbacks, "gemm_rate", lambda dtype, device: asked.append(dtype) or 1e6)
    module = LanguageModel(config)
    make_trainer(
        callbacks=Throughput(window_size=2), precision="bf16-mixed", limit_val_batches=0, max_steps=5
    ).fit(module, ragged())  # fmt: skip
    assert asked == [torch.bfloat16]
    # a micro batch is 2 x 12 tokens and takes the clock half a second
    assert logged("train/device/items_per_sec") == pytest.approx([48.0] * 4)
    assert logged("train/device/samples_per_sec") == pytest.approx([4.0] * 4)
    flops = 48 * 3 * module.model.flops_per_token(12)
    assert logged("train/device/mfu") == pytest.approx([flops / 1e6] * 4)


def test_devices_that_share_rows_share_what_is_counted_of_them() -> None:
    options = {"available_flops": 1000, "world_size": 4, "window_size": 2}
    shared, alone = (callbacks._OfOneDevice(sharing=sharing, **options) for sharing in (2, 1))
    for rates in (shared, alone):
        for i in (1, 2):
            rates.update(time=float(i), batches=i, samples=i, lengths=10 * i, flops=600)
    found, usual = shared.compute(), alone.compute()
    assert (found["device/items_per_sec"], found["items_per_sec"], found["device/mfu"]) == (5, 20, 0.3)
    assert (found["samples_per_sec"], found["flops_per_sec"]) == (2, 1200)
    assert {name: found[name] for name in ("time", "batches", "samples", "lengths")} == {
        "time": 2, "batches": 2, "samples": 2, "lengths": 20,
    }  # fmt: skip
    assert usual["device/items_per_sec"] == 10


def test_the_rate_of_a_matrix_product_stands_in_for_an_unknown_peak(make_trainer: Make, config: ModelConfig) -> None:
    monitor, trainer = Throughput(), make_trainer(precision="bf16-mixed")
    trainer.state.stage = "train"
    monitor.setup(trainer, LanguageModel(config), "fit")
    assert monitor.available_flops > 1e8
    assert all(part.available_flops == monitor.available_flops for part in monitor._throughputs.values())


# --- MemoryLengthHistogram

Histograms = list[tuple[str, torch.Tensor, int]]


@pytest.fixture
def histograms(monkeypatch: pytest.MonkeyPatch) -> Histograms:
    """What TensorBoard is given."""
    given: Histograms = []
    monkeypatch.setattr(SummaryWriter, "add_histogram", lambda _, *content: given.append(content))
    return given


def test_histograms_hold_the_memory_of_each_gate(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path, histograms: Histograms
) -> None:
    module, width = LanguageModel(config), config.d_model
    module.configure_model()
    mixer = module.model.layers[0].mixer
    with torch.no_grad():
        mixer.gate_bias[:3] = torch.tensor([-3.0, 0.0, 9.0])
    projected, watched = [], []

    def look(layer: Any, args: Any, out: torch.Tensor) -> None:
        projected.append((out.detach(), mixer.gate_bias.detach().clone()))
        watched.append(mixer.watched)

    mixer.in_proj.register_forward_hook(look)
    make_trainer(
        callbacks=MemoryLengthHistogram(every_n_steps=2), logger=TensorBoardLogger(tmp_path),
        max_steps=5, accumulate_grad_batches=2, limit_val_batches=0,
    ).fit(module, ragged())  # fmt: skip
    # one look at each of steps 0, 2 and 4, at the first of their two micro batches
    assert [(tag, step) for tag, _, step in histograms] == [("memory_length/layer_00", step) for step in (0, 2, 4)]
    assert watched == [True, False, False, False] * 2 + [True, False]
    for (_, lengths, step), (out, bias) in zip(histograms, projected[::4], strict=True):
        gate = torch.sigmoid(out[0, :, 2 * width : 3 * width].double() + bias)
        torch.testing.assert_close(lengths.double(), (1 / (1 - gate)).clamp(max=12), rtol=1e-5, atol=0, msg=str(step))
    assert histograms[0][1].max() == 12, "one gate remembers more than there is"
    assert mixer.watched is False
    assert mixer.gate_logits is None


def test_histograms_can_be_read_back(config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    make_trainer(callbacks=MemoryLengthHistogram(2), logger=logger).fit(
        LanguageModel(config, activation_checkpointing=True), ragged()
    )
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    assert events.Tags()["histograms"] == ["memory_length/layer_00"]
    assert [event.step for event in events.Histograms("memory_length/layer_00")] == [0, 2]
    means, medians = (events.Scalars(f"memory_length_{name}/layer_00") for name in ("mean", "median"))
    for event, mean, median in zip(events.Histograms("memory_length/layer_00"), means, medians, strict=True):
        found = event.histogram_value
        assert (mean.step, median.step) == (event.step, event.step)
        assert mean.value == pytest.approx(found.sum / found.num, rel=1e-5)
        below = sum(n for limit, n in zip(found.bucket_limit, found.bucket, strict=True) if limit < median.value)
        assert below <= found.num / 2 <= below + max(found.bucket)
    for event in events.Histograms("memory_length/layer_00"):
        assert event.histogram_value.num == 12 * config.d_model
        assert 1 < event.histogram_value.min < event.histogram_value.max <= 12


def test_without_tensorboard_nothing_is_watched(
    config: ModelConfig, ragged: Data, make_trainer: Make, histograms: Histograms
) -> None:
    module = LanguageModel(config)
    make_trainer(callbacks=MemoryLengthHistogram(1)).fit(module, ragged())
    assert not histograms
    assert module.model.layers[0].mixer.gate_logits is None


def test_looks_need_a_distance() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        MemoryLengthHistogram(every_n_steps=0)
