"""What happens beside training: the exported model, throughput, and a look at the gates."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ThroughputMonitor
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_modules.sharding import gather_weights
from rat import CausalLM
from rat.benchmarks.timing import gemm_rate
from rat.layers import GatedMixer


class ExportModel(Callback):
    """Write the trained model for `CausalLM.from_pretrained` and `cli.py generate`, when training ends.

    Args:
        folder: where model.safetensors and config.json go. Default: `model` in the run's folder.
        tokenizer: a tokenizer.json to put beside them. Default: the `tokenizer_file` of the data module, if it has one.
    """

    def __init__(self, folder: Path | None = None, tokenizer: Path | None = None) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a missing tokenizer before training, not after."""
        self.tokenizer = self.tokenizer or getattr(trainer.datamodule, "tokenizer_file", None)
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise FileNotFoundError(f"ExportModel: the tokenizer {self.tokenizer} does not exist")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export from rank 0 what all ranks hold together."""
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model"
        if trainer.fast_dev_run:
            return
        weights = gather_weights(trainer.strategy.model)
        if trainer.is_global_zero:
            with torch.device("meta"):
                model = CausalLM(pl_module.config)
            prefix = "model."
            model.load_state_dict({name.removeprefix(prefix): x for name, x in weights.items()}, assign=True)
            model.save_pretrained(folder)
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, folder / "tokenizer.json")


class PredictionWriter(BasePredictionWriter):
    """Write what `predict` finds, a line of JSON for each sequence with counted targets, in the order of the data.

    Args:
        path: the file. Default: predictions.jsonl in the run's folder. Every rank beyond the first has one of its own.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__("batch")
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file anew."""
        path = self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl"
        self.path = path if trainer.is_global_zero else path.with_suffix(f".{trainer.global_rank}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *_: Any) -> None:
        """Append the sequences of a batch."""
        columns = {name: values.tolist() for name, values in prediction.items()}
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["tokens"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        print(f"predictions: {self.path}")


class Throughput(ThroughputMonitor):
    """Lightning's monitor, counting tokens: train/device/items_per_sec are tokens/s, train/device/mfu is the
    utilisation in model FLOPs (recomputed activations do not count).

    Where Lightning does not know the device's peak (every CPU), the rate of a large matrix product in the compute
    dtype, measured at the start, takes its place.

    Args:
        window_size: micro batches over which rates are averaged; nothing is logged before that many.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(
            batch_size_fn=lambda batch: len(batch["input_ids"]),
            length_fn=lambda batch: batch["input_ids"].numel(),
            window_size=window_size,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out what the device can do."""
        super().setup(trainer, pl_module, stage)
        if self.available_flops is None:
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.available_flops = int(gemm_rate(dtype, trainer.strategy.root_device))
            for throughput in self._throughputs.values():
                throughput.available_flops = self.available_flops


class MemoryLengthHistogram(Callback):
    """TensorBoard histograms of memory_length/layer_NN: how many tokens back each channel's gate remembers.

    It is 1 / (1 - g) over one sequence and all channels, cut at its length T: further back there is nothing.

    Args:
        every_n_steps: optimiser steps between two looks.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._watched: dict[int, GatedMixer] = {}
        self._step: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the layers to keep their gates in the first micro batch of a step that logs."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or not trainer.is_global_zero or trainer.global_step % self.every_n_steps:
            return
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        layers = enumerate(pl_module.model.layers)
        self._watched = {i: layer.mixer for i, layer in layers if isinstance(layer.mixer, GatedMixer)}
        for mixer in self._watched.values():
            mixer.watched = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the histograms, and let go of the gates."""
        for i, mixer in self._watched.items():
            lengths = mixer.memory_length()[0]
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram(
                        f"memory_length/layer_{i:02d}", lengths.clamp(max=len(lengths)), self._step
                    )
            mixer.watched, mixer.gate_logits = False, None
        self._watched = {}
