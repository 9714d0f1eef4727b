"""What happens beside training: the exported model, throughput, and a look at the gates."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import throughput
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.dashboard import writers
from lightning_modules.sharding import DataRank, gather_weights
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
            # shapes that tensor parallelism has given them
            whole = {name: weights[f"model.{name}"].reshape(p.shape) for name, p in model.named_parameters()}
            model.load_state_dict(whole, assign=True)
            model.save_pretrained(folder)
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, folder / "tokenizer.json")


class Throughput(ThroughputMonitor):
    """Lightning's monitor, counting tokens: train/device/items_per_sec are tokens/s, train/device/mfu is the
    utilisation in model FLOPs (recomputed activations do not count).

    Where Lightning does not know the device's peak (every CPU), the rate of a large matrix product in the compute
    dtype, measured at the start, takes its place. Devices that share rows (context and tensor parallelism) share what
    is counted of them.

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
        self._throughputs = {
            stage: _OfOneDevice(
                sharing=DataRank.of(trainer).sharing,
                available_flops=self.available_flops,
                world_size=trainer.world_size,
                **self.kwargs,
            )
            for stage in self._throughputs
        }

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, *rest: Any) -> None:
        """Let training's clock go on from here; in Lightning from the last batch, before texts are sampled."""
        super().on_validation_end(trainer, *rest)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            made = self._throughputs[RunningStage.TRAINING]._time
            self._t0s[RunningStage.TRAINING] = time.perf_counter() - (made[-1] if made else 0.0)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        """Count the tokens of sequences; how many an answer will have is not known beforehand."""
        if "prompts" not in batch:
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, *rest)


class _OfOneDevice(throughput.Throughput):
    """Lightning's rates, where `sharing` devices work on the same rows."""

    def __init__(self, sharing: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharing = sharing

    def compute(self) -> dict[str, int | float]:
        """See Lightning's."""
        found = super().compute()
        return {name: x / self.sharing if name.endswith(("_per_sec", "mfu")) else x for name, x in found.items()}


class MemoryLengthHistogram(Callback):
    """TensorBoard histograms of memory_length/layer_NN: how many tokens back each channel's gate would remember; their
    means and medians are the scalars memory_length_mean/layer_NN and memory_length_median/layer_NN.

    It is 1 / (1 - g) over one sequence and all channels, cut at its length T: further back there is nothing. The states
    of RAT begin anew with every chunk, so that of what its gates would remember, it has no more than L tokens. Where
    devices share a sequence, it is that of the first device's tokens or channels.

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
        if not writers(trainer) or trainer.global_step % self.every_n_steps:
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
        """Write what was seen, and let go of the gates."""
        length = batch["input_ids"].shape[1]
        for i, mixer in self._watched.items():
            lengths, layer = mixer.memory_length()[0].clamp(max=length), f"layer_{i:02d}"
            for writer in writers(trainer):
                writer.add_histogram(f"memory_length/{layer}", lengths, self._step)
                writer.add_scalar(f"memory_length_mean/{layer}", lengths.mean(), self._step)
                writer.add_scalar(f"memory_length_median/{layer}", lengths.median(), self._step)
            mixer.watched, mixer.gate_logits = False, None
        self._watched = {}
