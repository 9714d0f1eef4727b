"""The LightningModule for language modelling."""

import functools
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

from lightning_modules import sharding
from lightning_modules.metrics import TokenMean
from lightning_modules.schedule import PAPER, OptimizerConfig, accumulation, adamw
from lightning_modules.scores import Scores, sequence_scores
from rat import CausalLM, ModelConfig
from rat.model import IGNORED
from rat.ops.backend import Backend, describe_backend, set_backend

Batch = dict[str, Tensor]
MODEL_CONFIG, CODE_VERSION = "model_config", "code_version"


class LanguageModel(LightningModule):
    """Next-token prediction with a `CausalLM`, in any precision that the Trainer is given.

    A batch is a dict of (B, T) int64 tensors: `input_ids`; `labels`, shifted already, -100 where a target does not
    count; and `document_ids`, if packed documents are to be kept apart.

    An optimiser step descends the mean loss of its counted targets, each weighing the same, however they are spread
    over micro batches and devices.

    Logged: train/loss (nats per token, over the micro batches and devices of the step), train/lr, train/grad_norm (of
    all parameters together, before clipping), train/tokens (seen so far); {val,test}/loss, /perplexity, weighted by
    tokens over all devices, and /bits_per_byte where the data module knows `val_bytes_per_token`. With `accuracy` also
    {val,test}/accuracy, the share of counted targets that are the likeliest token, and /sequence_accuracy, the share
    of sequences (rows; with `document_ids`, documents of a row) that have counted targets and get all of them right.

    Args:
        model: the architecture.
        optimizer: AdamW and its schedule.
        global_batch_size: sequences of an optimiser step, over all devices; the Trainer's accumulation follows from
            it and the data module's `batch_size`. null leaves the Trainer's accumulation as it is.
        val_every_n_steps: optimiser steps between two validations. null leaves the Trainer's val_check_interval,
            which counts micro batches, so that it means something else on another number of devices.
        kernel_backend: which implementation of `rat.ops` runs; auto takes the fastest that the device can, and the log
            says which.
        compile: compile the model with torch.compile.
        activation_checkpointing: keep only each block's input for the backward pass and compute the rest again.
        init_from: a folder of `save_pretrained` or a released .pth, whose weights training starts from.
        accuracy: measure it in validation, test and prediction. This stores the logits of all counted targets of a
            micro batch: meant for data in which few count, like answers.

    Raises:
        ValueError: in setup, if the kernel backend cannot run on the device, the data's vocabulary does not fit the
            model's, or batch_size not global_batch_size; on loading, if a checkpoint holds another architecture.
    """

    flops_per_batch: int
    tokens_per_step: int  # of an optimiser step, over all devices, counted or not

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig = PAPER,
        global_batch_size: int | None = None,
        val_every_n_steps: int | None = None,
        kernel_backend: Backend = "auto",
        compile: bool = False,
        activation_checkpointing: bool = False,
        init_from: Path | None = None,
        accuracy: bool = False,
    ) -> None:
        super().__init__()
        self.config = model
        self.optimizer_config = optimizer
        self.global_batch_size = global_batch_size
        self.val_every_n_steps = val_every_n_steps
        self.kernel_backend = kernel_backend
        self.compile_model = compile
        self.activation_checkpointing = activation_checkpointing
        self.init_from = init_from
        self.accuracy = accuracy
        self.model: CausalLM | None = None
        self.train_nll, self.val_nll, self.test_nll = TokenMean(), TokenMean(), TokenMean()
        names = ("accuracy", "sequence_accuracy") if accuracy else ()
        self.accuracies = nn.ModuleDict({f"{stage}/{name}": TokenMean() for stage in ("val", "test") for name in names})

    def setup(self, stage: str) -> None:
        """Check device and data against the model, and turn the global batch into accumulation."""
        _say_once(describe_backend(self.kernel_backend, self.trainer.strategy.root_device, training=stage == "fit"))
        set_backend(self.kernel_backend)
        data = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(data, "vocab_size", None)
        if vocab_size is not None and vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the data has {vocab_size} token ids, the model only {self.config.vocab_size}:"
                f" set model.model.vocab_size to {vocab_size}"
            )
        if stage == "fit":
            self._count_in_steps(getattr(data, "batch_size", None))

    def _count_in_steps(self, batch_size: int | None) -> None:
        """Tell the Trainer, which counts micro batches, what was said in sequences and optimiser steps."""
        trainer = self.trainer
        if self.global_batch_size is not None:
            if batch_size is None:
                raise ValueError("global_batch_size needs a data module with a batch_size: give one, or set it to null")
            size = self._data_parallel_size()
            trainer.accumulate_grad_batches = accumulation(self.global_batch_size, batch_size, size)
        if self.val_every_n_steps is not None and not trainer.fast_dev_run:
            trainer.val_check_interval = self.val_every_n_steps * trainer.accumulate_grad_batches
            trainer.check_val_every_n_epoch = None

    def configure_model(self) -> None:
        """Build the model, once; a context of the strategy decides where its weights lie."""
        if self.model is not None:
            return
        if self.init_from is None:
            self.model = CausalLM(self.config)
        else:
            # fp32, whatever it was saved in: products may run in less, weights may not
            self.model = CausalLM.from_pretrained(self.init_from, self.config).float()
        if self.activation_checkpointing:
            for i, block in enumerate(self.model.layers):
                self.model.layers[i] = checkpoint_wrapper(block)
        if self.device_mesh is not None:
            self._shard()
        elif self.compile_model:
            self.model.compile()

    def _shard(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, sharding.FSDP2Strategy):
            raise ValueError(
                f"{type(strategy).__name__} does not say how to shard the model: take"
                " lightning_modules.FSDP2Strategy, see configs/strategy/fsdp2.yaml"
            )
        assert self.model is not None
        if self.compile_model:
            for block in self.model.layers:  # between blocks, weights are gathered
                block.compile()
        strategy.shard(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on all parameters; the schedule spans the steps that the Trainer is going to make."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the learning rate's schedule needs an end: set trainer.max_steps or trainer.max_epochs")
        optimizer, schedule = adamw(self.parameters(), int(steps), self.optimizer_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The losses of a micro batch's counted targets, in nats, over the number of its places, counted or not.

        How many count in the whole step is known at its end; until then the sums of micro batches must stay in
        proportion, so they are divided by what all of them have in common.
        """
        loss, counted = self._loss(batch, passes=3)
        self.train_nll.update(loss.detach(), counted)
        return loss * (counted / batch["labels"].numel())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the step that is about to be made, and make its gradient that of the mean over its counted targets."""
        with self.train_nll.sync_context():
            total, counted = self.train_nll.total, self.train_nll.tokens.clamp(min=1)
        self.train_nll.reset()
        # the strategy has averaged over ranks, the Trainer over micro batches
        places = self.tokens_per_step // self._data_parallel_size() * self.trainer.world_size
        sharding.scale_gradients(self, (places / counted).float())
        self.log("train/loss", total / counted, prog_bar=True)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        self.log("train/tokens", float((self.trainer.global_step + 1) * self.tokens_per_step))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all ranks' gradients together, once, and log it. Lightning's own refuses under FSDP."""
        by_value = gradient_clip_algorithm == "value"
        norm = sharding.clip_gradients(self.trainer.strategy.model, None if by_value else gradient_clip_val)
        self.log("train/grad_norm", norm)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a micro batch."""
        self._count("val", self.val_nll, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a micro batch."""
        self._count("test", self.test_nll, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Scores of the S sequences of a batch: of every row; with `document_ids`, of every document of a row that
        has counted targets, row by row and in the order of their ids.

        Returns:
            `nll` (S,) fp64, the mean loss in nats per counted target, 0 where there is none; `tokens` (S,) int64, how
            many there are; with `accuracy` also `correct` (S,) bool, whether each of them is the likeliest token.
        """
        scores = self._scores(batch)
        predicted = {"nll": scores.nll, "tokens": scores.tokens}
        return predicted | {"correct": scores.right == scores.tokens} if self.accuracy else predicted

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all devices' tokens."""
        self._log_metrics("val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all devices' tokens."""
        self._log_metrics("test", self.test_nll)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the architecture and the version of this code beside the weights, as plain values."""
        checkpoint[MODEL_CONFIG] = self.config.to_dict()
        checkpoint[CODE_VERSION] = version("rat-lab")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another architecture before its weights do; warn of another version of this code."""
        if MODEL_CONFIG not in checkpoint:
            raise ValueError(f"the checkpoint holds no {MODEL_CONFIG}, so it is none of LanguageModel")
        saved = ModelConfig.from_dict(checkpoint[MODEL_CONFIG], "the checkpoint's config")
        if changed := saved.differences(self.config):
            raise ValueError(f"the checkpoint holds another model than the config: {changed}")
        if (wrote := checkpoint.get(CODE_VERSION)) != version("rat-lab"):
            rank_zero_warn(
                f"the checkpoint was written by rat-lab {wrote}, this is {version('rat-lab')}: to end with the same"
                " weights as that one would, go on with it"
            )

    def _count(self, stage: str, nll: TokenMean, batch: Batch) -> None:
        """Update the metrics of `stage` with a micro batch."""
        if not self.accuracy:
            nll.update(*self._loss(batch))
            return
        scores = self._scores(batch)
        counted = scores.tokens.sum()
        nll.update((scores.nll * scores.tokens).sum() / counted.clamp(min=1), counted)
        self.accuracies[f"{stage}/accuracy"].update(scores.right.sum() / counted.clamp(min=1), counted)
        sequences = (scores.tokens > 0).sum()
        solved = ((scores.right == scores.tokens) & (scores.tokens > 0)).sum()
        self.accuracies[f"{stage}/sequence_accuracy"].update(solved / sequences.clamp(min=1), sequences)

    def _loss(self, batch: Batch, passes: int = 1) -> tuple[Tensor, Tensor]:
        """The mean loss and how many targets count; `passes` of the forward FLOPs are what the step costs."""
        return self._forward(batch, passes, labels=batch["labels"]), (batch["labels"] != IGNORED).sum()

    def _scores(self, batch: Batch) -> Scores:
        logits = self._forward(batch, positions=batch["labels"] != IGNORED)
        return sequence_scores(logits, batch["labels"], batch.get("document_ids"))

    def _forward(self, batch: Batch, passes: int = 1, **wanted: Tensor) -> Tensor:
        assert self.model is not None
        input_ids = batch["input_ids"]
        self.flops_per_batch = passes * self.model.flops_per_token(input_ids.shape[1]) * input_ids.numel()
        self.tokens_per_step = input_ids.numel() * self._data_parallel_size() * self.trainer.accumulate_grad_batches
        return self.model(input_ids, document_ids=batch.get("document_ids"), **wanted)

    def _log_metrics(self, stage: str, nll: TokenMean) -> None:
        loss = nll.compute()
        nll.reset()
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/perplexity", loss.exp(), sync_dist=True)
        if bytes_per_token := getattr(getattr(self.trainer, "datamodule", None), "val_bytes_per_token", None):
            self.log(f"{stage}/bits_per_byte", loss / math.log(2) / bytes_per_token, sync_dist=True)
        for name, metric in self.accuracies.items():
            if name.startswith(stage):
                self.log(name, metric.compute(), prog_bar=True, sync_dist=True)
                metric.reset()

    def _data_parallel_size(self) -> int:
        return (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]


@functools.cache
def _say_once(line: str) -> None:
    """Log the line, unless this process has done so before."""
    rank_zero_info(line)
