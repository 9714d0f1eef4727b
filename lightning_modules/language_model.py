"""The LightningModule for language modelling."""

import functools
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

from lightning_modules import sharding
from lightning_modules.metrics import HitsByOctave, TokenMean
from lightning_modules.schedule import PAPER, OptimizerConfig, accumulation, adamw
from lightning_modules.scores import Scores, sequence_scores
from lightning_modules.sharded_checkpoints import MODEL_CONFIG
from rat import CausalLM, ContextShard, ModelConfig
from rat.model import IGNORED
from rat.ops.backend import Backend, cpu_multiplies_bf16, describe_backend, set_backend
from rat.tensor_parallel import check_ranks

Batch = dict[str, Tensor]
CODE_VERSION = "code_version"


class MeasuredStep(NamedTuple):
    """Of the optimiser step about to be made, over all micro batches and devices; scalars, the same on all of them.

    Attributes:
        loss: nats per counted target, fp64.
        grad_norm: of all parameters' gradients together, before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


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
    With `accuracy_by: [distance]` also {val,test}/accuracy_by_distance/N, of the targets whose `distance` is above
    N / 2 and at most N, for every N of 1, 2, 4, 8, ... that has any.

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
        accuracy_by: further (B, T) int64 tensors of the batches, by which the accuracy is told apart as well. 0 marks
            targets that are left out.

    Raises:
        ValueError: accuracy_by without accuracy, or of what the batches do not have; in setup, if the kernel backend
            cannot run on the device, the data's vocabulary does not fit the model's, batch_size not global_batch_size,
            its rows context parallelism, or the model's heads tensor parallelism; on loading, if a checkpoint holds
            another architecture.
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
        accuracy_by: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if accuracy_by and not accuracy:
            raise ValueError("accuracy_by tells accuracies apart, which are not measured: set accuracy to true")
        self.config = model
        self.optimizer_config = optimizer
        self.global_batch_size = global_batch_size
        self.val_every_n_steps = val_every_n_steps
        self.kernel_backend = kernel_backend
        self.compile_model = compile
        self.activation_checkpointing = activation_checkpointing
        self.init_from = init_from
        self.accuracy, self.accuracy_by = accuracy, accuracy_by
        self.model: CausalLM | None = None
        self._step: MeasuredStep | None = None
        self.train_nll, self.val_nll, self.test_nll = TokenMean(), TokenMean(), TokenMean()
        names = ("accuracy", "sequence_accuracy") if accuracy else ()
        self.accuracies = nn.ModuleDict({f"{stage}/{name}": TokenMean() for stage in ("val", "test") for name in names})
        groups = [f"{stage}/accuracy_by_{name}" for stage in ("val", "test") for name in accuracy_by]
        self.accuracies_by = nn.ModuleDict({group: HitsByOctave() for group in groups})

    def setup(self, stage: str) -> None:
        """Check device and data against the model, and turn the global batch into accumulation."""
        if isinstance(self.trainer.strategy, sharding.FSDP2Strategy):
            check_ranks(self.config, self.trainer.strategy.tensor_parallel_size)
        device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        _say_once(describe_backend(self.kernel_backend, device, training=stage == "fit"))
        if device.type == "cpu" and precision.startswith("bf16") and not cpu_multiplies_bf16():
            _say_once(f"trainer.precision {precision}: this CPU has no bf16 instructions, 32-true is faster on it")
        set_backend(self.kernel_backend)
        data = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(data, "vocab_size", None)
        if vocab_size is not None and vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the data has {vocab_size} token ids, the model only {self.config.vocab_size}:"
                f" set model.model.vocab_size to {vocab_size}"
            )
        if (length := getattr(data, "seq_len", None)) is not None and self._context_shard(length) is not None:
            for option in ("mask_documents", "packing"):
                if getattr(data, option, False):
                    raise ValueError(
                        f"data.init_args.{option} gives rows with document_ids, which cannot be dealt out over devices:"
                        " set it to false, or trainer.strategy.init_args.context_parallel_size to 1"
                    )
        if stage == "fit":
            self._count_in_steps(getattr(data, "batch_size", None))

    def _count_in_steps(self, batch_size: int | None) -> None:
        """Tell the Trainer, which counts micro batches, what was said in sequences and optimiser steps."""
        trainer = self.trainer
        if self.global_batch_size is not None:
            if batch_size is None:
                raise ValueError("global_batch_size needs a data module with a batch_size: give one, or set it to null")
            size = sharding.DataRank.of(trainer).size
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
        self._step = None
        return loss * (counted / batch["labels"].numel())

    def finish_gradient(self) -> MeasuredStep:
        """Make the gradient of the micro batches that of the mean over their counted targets, and look at it.

        Whoever asks first has it done, before each optimiser step; all ranks together.
        """
        if self._step is None:
            with self.train_nll.sync_context():
                total, counted = self.train_nll.total, self.train_nll.tokens.clamp(min=1)
            self.train_nll.reset()
            # the strategy has averaged over ranks, the Trainer over micro batches; processes that share rows counted
            # each of these
            places = self.tokens_per_step * sharding.DataRank.of(self.trainer).sharing
            sharding.scale_gradients(self, (places / counted).float())
            self._step = MeasuredStep(total / counted, sharding.gradient_norm(self.trainer.strategy.model))
        return self._step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the step that is about to be made."""
        step = self.finish_gradient()
        self.log("train/loss", step.loss, prog_bar=True)
        self.log("train/grad_norm", step.grad_norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        self.log("train/tokens", float((self.trainer.global_step + 1) * self.tokens_per_step))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all ranks' gradients together. Lightning's own refuses under FSDP."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            sharding.clip_gradients(self, gradient_clip_val, self.finish_gradient().grad_norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a micro batch."""
        self._count("val", self.val_nll, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a micro batch."""
        self._count("test", self.test_nll, batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Scores of the S sequences of a batch: of every row; with `document_ids`, of every document of a row that
        has counted targets, row by row and in the order of their ids. Or answers, where a batch brings `prompts`.

        Returns:
            `nll` (S,) fp64, the mean loss in nats per counted target, 0 where there is none; `tokens` (S,) int64, how
            many there are; with `accuracy` also `correct` (S,) bool, whether each of them is the likeliest token.
            Or `answers`, a list of tokens for each prompt, by greedy decoding up to and with the batch's `eos_id`, or
            of `max_new_tokens`.

        Raises:
            ValueError: prompts are to be answered where devices share the weights.
        """
        if "prompts" in batch:
            return {"answers": self._answers(batch)}
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

    def _answers(self, batch: dict[str, Any]) -> list[list[int]]:
        if sharding.shards_weights(self.trainer.strategy):
            raise ValueError(
                "prompts are answered by whole models: take configs/strategy/single.yaml or ddp.yaml, and of a"
                " checkpoint of shards what cli.py convert --to file makes of it"
            )
        assert self.model is not None
        limits = {"max_new_tokens": batch["max_new_tokens"], "eos_token_id": batch["eos_id"]}
        return self.model.generate(batch["prompts"], **limits)

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
        shard = self._context_shard(batch["labels"].shape[1])
        for name in self.accuracy_by:
            labels, numbers = (x if shard is None else shard.part(x) for x in (batch["labels"], batch[name]))
            self.accuracies_by[f"{stage}/accuracy_by_{name}"].update(scores.hits, numbers[labels != IGNORED])

    def _loss(self, batch: Batch, passes: int = 1) -> tuple[Tensor, Tensor]:
        """The mean loss and how many targets count; `passes` of the forward FLOPs are what the step costs."""
        return self._forward(batch, passes, labels=batch["labels"]), (batch["labels"] != IGNORED).sum()

    def _scores(self, batch: Batch) -> Scores:
        labels, shard = batch["labels"], self._context_shard(batch["labels"].shape[1])
        logits = self._forward(batch, positions=labels != IGNORED)
        if shard is None:
            return sequence_scores(logits, labels, batch.get("document_ids"))
        own = sequence_scores(logits, shard.part(labels))
        total, tokens, right = (shard.sum(x) for x in (own.nll * own.tokens, own.tokens, own.right))
        return Scores(total / tokens.clamp(min=1), tokens, right, own.hits)

    def _forward(self, batch: Batch, passes: int = 1, **wanted: Tensor) -> Tensor:
        assert self.model is not None
        if unknown := [name for name in self.accuracy_by if name not in batch]:
            raise ValueError(f"accuracy_by names {unknown[0]}, but the batches hold {', '.join(batch)}")
        input_ids = batch["input_ids"]
        self.flops_per_batch = passes * self.model.flops_per_token(input_ids.shape[1]) * input_ids.numel()
        size = sharding.DataRank.of(self.trainer).size
        self.tokens_per_step = input_ids.numel() * size * self.trainer.accumulate_grad_batches
        shard, given = self._context_shard(input_ids.shape[1]), {"input_ids": input_ids, **wanted}
        if shard is not None:
            given = {name: shard.part(x) for name, x in given.items()}
        return self.model(**given, document_ids=batch.get("document_ids"), shard=shard)

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
        for name, metric in self.accuracies_by.items():
            if name.startswith(stage):
                for number, share in metric.compute().items():
                    self.log(f"{name}/{number}", share, sync_dist=True)
                metric.reset()

    def _context_shard(self, length: int) -> ContextShard | None:
        """This process's part of rows of `length` tokens; None where it has whole ones."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, sharding.FSDP2Strategy):
            return None
        return strategy.context_shard(length, self.config.chunk_size if "rat" in self.config.pattern else 1)


@functools.cache
def _say_once(line: str) -> None:
    """Log the line, unless this process has done so before."""
    rank_zero_info(line)
