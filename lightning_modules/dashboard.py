"""What TensorBoard shows of a run beside its curves: hyperparameters with metrics, a layout of charts, plain texts."""

import os
import textwrap
import time
from dataclasses import asdict

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter

from lightning_modules.language_model import LanguageModel
from lightning_modules.run_folder import reached_end
from rat import ModelConfig

# The scalars by which runs compare; TensorBoard shows the last value of each.
METRICS = {
    "val/loss": "nats per token",
    "val/perplexity": "exp of val/loss",
    "val/bits_per_byte": "of the validation text",
    "train/device/items_per_sec": "tokens/s of a device",
    "train/tokens": "seen so far",
    "train/loss": "nats per token, of the last step logged",
    "val/accuracy": "share of counted targets, where it is measured",
}
# Tags are regular expressions, matched from their beginning.
CHARTS = {
    "loss": {
        "loss, nats per token": ["train/loss$", "val/loss$"],
        "bits per byte of validation text": ["val/bits_per_byte$"],
    },
    "perplexity": {
        "perplexity of validation text": ["val/perplexity$"],
    },
    "accuracy": {
        "accuracy": ["val/accuracy$", "val/sequence_accuracy$"],
        "accuracy by what accuracy_by names": ["val/accuracy_by_"],
    },
    "throughput": {
        "tokens/s of a device": ["train/device/items_per_sec$"],
        "model FLOP utilisation": ["train/device/mfu$"],
    },
    "gradients": {
        "norm of all gradients, before clipping": ["train/grad_norm$"],
        "learning rate": ["train/lr$"],
    },
    "memory lengths by layer": {
        "mean over channels and tokens, in tokens": ["memory_length_mean/"],
        "median over channels and tokens, in tokens": ["memory_length_median/"],
    },
}
# What TensorBoard shows unasked; it takes those that differ between runs first, and the first five of them.
_SHOWN = ("pattern", "chunk_size", "parameters", "peak_lr", "seed")
# Of these a run tells only what its mixers read.
_READ_BY = {
    "chunk_size": {"rat"}, "num_groups": {"rat"}, "window_size": {"sliding_window"},
    "rope_base": {"rat", "attention", "sliding_window"},
}  # fmt: skip
_WORDS = ("pattern", "betas", "precision", "data")

Hyperparameter = str | float | None


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """What writes for TensorBoard; nothing on other ranks than 0, or where the run has no such logger."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def preformatted(text: str) -> str:
    """Markdown that shows `text` letter by letter, whatever stands in it."""
    return textwrap.indent(text.expandtabs(), "    ", lambda line: True)


class Dashboard(Callback):
    """Lets runs compare in TensorBoard: HPARAMS holds what was chosen with the last values of METRICS, CUSTOM SCALARS
    the CHARTS.

    A run that goes on in its folder stays one row. The folder's first start tells the hyperparameters: TensorBoard
    reads no second ones.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        """Tell the layout and the hyperparameters; the metrics are the curves' own."""
        values = hyperparameters(trainer, pl_module)
        layout = {
            title: {chart: ["Multiline", tags] for chart, tags in charts.items()}
            for title, charts in CHARTS.items()
            if pl_module.accuracy or title != "accuracy"
        }
        for writer in writers(trainer):
            writer.add_custom_scalars(layout)
            _add(writer, metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=_columns(values)))
            _add(writer, metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=_row(values)))

    def on_fit_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        """Tell that the run has come to its end."""
        if reached_end(trainer):
            end = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
            for writer in writers(trainer):
                _add(writer, metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def unread(model: ModelConfig) -> list[str]:
    """The names in a model's config that none of its mixers reads."""
    return [name for name, mixers in _READ_BY.items() if not mixers & {*model.pattern}]


def hyperparameters(trainer: Trainer, pl_module: LanguageModel) -> dict[str, Hyperparameter]:
    """Name and value of what was chosen for a run: architecture, optimiser, batch, data. The names are those of every
    run; None stands for null in the config, and for what none of the model's mixers reads."""
    model, data = pl_module.config, trainer.datamodule
    architecture = asdict(model) | {"pattern": ", ".join(model.pattern)}
    optimizer = asdict(pl_module.optimizer_config)
    seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
    assert pl_module.model is not None
    return {
        **(architecture | dict.fromkeys(unread(model))),
        "parameters": pl_module.model.num_parameters(),
        **(optimizer | {"betas": ", ".join(map(str, optimizer["betas"]))}),
        "gradient_clip_val": trainer.gradient_clip_val,
        "max_steps": trainer.max_steps,
        "global_batch_size": pl_module.global_batch_size,
        "precision": str(trainer.precision),
        "seed": None if seed is None else int(seed),
        "data": type(data).__name__,
        "seq_len": getattr(data, "seq_len", None),
        "data_seed": getattr(data, "seed", None),
    }


def _columns(values: dict[str, Hyperparameter]) -> Experiment:
    return Experiment(
        hparam_infos=[
            HParamInfo(
                name=name,
                type=DATA_TYPE_STRING if name in _WORDS else DATA_TYPE_FLOAT64,
                differs=name in _SHOWN,
            )
            for name in values
        ],
        metric_infos=[
            MetricInfo(name=MetricName(tag=tag), display_name=tag, description=text) for tag, text in METRICS.items()
        ],
    )


def _row(values: dict[str, Hyperparameter]) -> SessionStartInfo:
    row = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            row.hparams[name].string_value = value
        elif value is not None:
            row.hparams[name].number_value = value
    return row


def _add(writer: SummaryWriter, tag: str, content: HParamsPluginData) -> None:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content))
    writer.file_writer.add_summary(Summary(value=[value]))
