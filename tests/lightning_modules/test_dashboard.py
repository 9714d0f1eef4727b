"""What TensorBoard is told of a run, read back by TensorBoard's own code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, metadata

from lightning_modules import Dashboard, LanguageModel, LastCheckpoint, MemoryLengthHistogram, OptimizerConfig
from lightning_modules.dashboard import CHARTS, METRICS, preformatted
from rat import ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]
Fit = Callable[..., Path]


@pytest.fixture
def fit(config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path) -> Fit:
    """Train in the folder `run`, with a Dashboard; arguments are those of Trainer, but for some."""

    def train(model: ModelConfig = config, resume: str | None = None, **options: Any) -> Path:
        logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
        callbacks = [Dashboard(), MemoryLengthHistogram(1), LastCheckpoint(1)]
        defaults = {"logger": logger, "callbacks": callbacks, "enable_checkpointing": True}
        module = LanguageModel(model, OptimizerConfig(peak_lr=2e-3, betas=(0.8, 0.9)))
        make_trainer(**defaults | options).fit(module, ragged(seq_len=12, seed=3), ckpt_path=resume)
        return tmp_path / "run"

    return train


class Interruption(Callback):
    """Stops training after its second step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


def told(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def hparams(events: EventAccumulator) -> dict[str, bytes]:
    return events.PluginTagToContent(metadata.PLUGIN_NAME)


def chosen(events: EventAccumulator) -> dict[str, Any]:
    start = metadata.parse_session_start_info_plugin_data(hparams(events)[metadata.SESSION_START_INFO_TAG])
    return {name: value.string_value or value.number_value for name, value in start.hparams.items()}


def status(events: EventAccumulator) -> int | None:
    content = hparams(events).get(metadata.SESSION_END_INFO_TAG)
    return None if content is None else metadata.parse_session_end_info_plugin_data(content).status


def test_hyperparameters_are_what_was_chosen(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    events = told(fit())
    values = chosen(events)
    assert values.pop("parameters") > 1000
    assert values == {
        "vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "pattern": "rat, sliding_window",
        "chunk_size": 4, "num_groups": 2, "window_size": 1024, "rope_base": 10000.0, "max_seq_len": 12,
        "norm_eps": 1e-6, "init_std": 0.02, "peak_lr": 2e-3, "betas": "0.8, 0.9", "weight_decay": 0.1, "eta_min": 1e-6,
        "warmup_fraction": 0.05, "gradient_clip_val": 1.0, "max_steps": 3, "precision": "32-true", "seed": 7,
        "data": "Ragged", "seq_len": 12, "data_seed": 3,
    }  # fmt: skip


def test_a_model_is_not_compared_by_what_it_does_not_read(fit: Fit, config: ModelConfig) -> None:
    kept = config.to_dict() | {"pattern": ["attention"], "rope_base": None}
    events = told(fit(ModelConfig.from_dict(kept)))
    assert not {"chunk_size", "num_groups", "window_size", "rope_base"} & set(chosen(events))
    experiment = metadata.parse_experiment_plugin_data(hparams(events)[metadata.EXPERIMENT_TAG])
    # the columns are those of the first run that TensorBoard finds, so every run names all of them
    kinds = {info.name: info.type for info in experiment.hparam_infos}
    assert kinds["chunk_size"] == kinds["rope_base"] == api_pb2.DATA_TYPE_FLOAT64
    assert kinds["pattern"] == api_pb2.DATA_TYPE_STRING


def test_metrics_and_charts_are_curves_of_the_run(fit: Fit) -> None:
    events = told(fit(max_steps=6))
    experiment = metadata.parse_experiment_plugin_data(hparams(events)[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == list(METRICS)
    curves = events.PluginTagToContent("scalars")
    # Throughput is another callback's, accuracy another model's
    assert set(METRICS) - set(curves) == {"val/accuracy", "train/device/items_per_sec"}
    assert "hp_metric" not in curves
    (config,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(config.tensor_proto.string_val[0])
    assert {category.title: [chart.title for chart in category.chart] for category in layout.category} == {
        title: list(charts) for title, charts in CHARTS.items() if title != "accuracy"
    }
    lengths = layout.category[-1].chart[0].multiline.tag
    assert list(lengths) == ["memory_length_mean/"]
    assert [tag for tag in curves if tag.startswith(lengths[0])] == ["memory_length_mean/layer_00"]


def test_a_resumed_run_stays_one_row_that_ends_with_its_last_start(fit: Fit) -> None:
    run = fit(max_steps=4, callbacks=[Dashboard(), LastCheckpoint(1), Interruption()])
    assert status(told(run)) is None
    run = fit(max_steps=6, resume="last")
    events = told(run)
    assert len(list(run.glob("events.out.tfevents.*"))) == 2
    assert [event.step for event in events.Tensors("train/loss")] == [0, 1, 2, 3, 4, 5]
    assert status(events) == api_pb2.STATUS_SUCCESS
    assert chosen(events)["max_steps"] == 4, "TensorBoard reads the first"
    assert not [path for path in run.parent.rglob("events*") if path.parent != run], "another run"


def test_a_fast_dev_run_tells_nothing(fit: Fit) -> None:
    run = fit(fast_dev_run=2)
    assert not run.exists()


@pytest.mark.parametrize("text", ["# no heading\n\n\t*x*  \n```\n    y", "\n`"])
def test_plain_text_stays_as_it_is(text: str) -> None:
    lines = preformatted(text).splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert [line[4:] for line in lines] == text.expandtabs().splitlines()
