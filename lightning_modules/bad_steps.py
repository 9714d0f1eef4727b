"""What becomes of an optimiser step that would spoil the model: it stops the run, is left out, or only told about."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.language_model import Batch, LanguageModel
from lightning_modules.run_folder import run_folder, sample_numbers
from lightning_modules.sharding import DataRank
from rat.model import IGNORED

Action = Literal["stop", "skip", "warn"]
BAD_STEP = "bad_step"
_SHOWN = 8


class BadStepError(ValueError):
    """Training stopped before a step that would have spoiled the model."""


class BadStepGuard(Callback):
    """Looks at every optimiser step before it is made: its loss, over all micro batches and devices, and its gradient.

    Bad is what is NaN or infinite, and a spike: a loss above mean + max(spike_std * std, spike_rise) of the last
    `spike_window` steps that were made. All ranks find the same. What happens then:

    - stop: training ends with a BadStepError that names the samples. `bad-step-N.ckpt` in the run's folder is the
      checkpoint before step N (from 0); under "bad_step" it holds the reason and the micro batches at fault: of each
      its rank, batch_idx, loss, samples, and the tensors of the batch. Resumed from it, training makes the step again.
    - skip: weights, the optimiser's means and its count of steps stay as they are, while the data, the learning rate's
      schedule and the count of steps of the run go on. train/skipped_steps counts.
    - warn: the step is made.

    Where gradients are scaled (16-mixed), infinite ones are normal, and only the loss is looked at. A step costs one
    wait for the device.

    Args:
        on_nan: what to do where a loss or gradient is NaN or infinite.
        on_spike: what to do where the loss is a spike.
        spike_window: optimiser steps that a loss is compared with; nothing is a spike before so many were made.
        spike_std: how far above their mean, in standard deviations.
        spike_rise: how far at least, in nats per token, however calm they were.
        max_skipped: steps skipped in a row after which the run stops all the same.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        on_nan: Action = "stop",
        on_spike: Action = "stop",
        spike_window: int = 100,
        spike_std: float = 10.0,
        spike_rise: float = 1.0,
        max_skipped: int = 10,
    ) -> None:
        for name, value, least in (("spike_window", spike_window, 2), ("max_skipped", max_skipped, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, limit in (("spike_std", spike_std), ("spike_rise", spike_rise)):
            if not limit > 0:
                raise ValueError(f"{name} must be above 0, got {limit}")
        self.on_nan, self.on_spike = on_nan, on_spike
        self.spike_std, self.spike_rise, self.max_skipped = spike_std, spike_rise, max_skipped
        self.skipped, self._in_a_row = 0, 0
        self._losses: deque[float] = deque(maxlen=spike_window)
        self._micro_batches: list[tuple[int, Batch, Tensor]] = []
        self._batch: tuple[int, Batch] | None = None
        self._found: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Batch, batch_idx: int) -> None:
        """Keep the micro batch until its step is made."""
        self._batch = batch_idx, batch

    def on_before_backward(self, trainer: Trainer, pl_module: LanguageModel, loss: Tensor) -> None:
        """Keep its loss beside it, on the device."""
        assert self._batch is not None
        self._micro_batches.append((*self._batch, loss.detach() * trainer.accumulate_grad_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LanguageModel, optimizer: Optimizer) -> None:
        """Judge the step. Raises BadStepError on all ranks if it is to stop the run."""
        limit = self._limit()
        step = pl_module.finish_gradient()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        loss, norm = torch.stack([step.loss, step.grad_norm.to(step.loss)]).tolist()
        nan_loss, nan_gradient = not math.isfinite(loss), not (math.isfinite(norm) or scaled)
        micro_batches, self._micro_batches = self._micro_batches, []
        option = "on_nan" if nan_loss or nan_gradient else "on_spike" if loss > limit else None
        if option is None:
            self._in_a_row = 0
        else:
            leap = f"the loss leaps to {loss:.3f}, above {limit:.3f}"
            reason = f"the loss is {loss}" if nan_loss else "the gradient is not finite" if nan_gradient else leap
            self._act(option, reason, trainer, optimizer, self._describe(trainer, micro_batches, limit))
        if (option is None or getattr(self, option) != "skip") and math.isfinite(loss):
            self._losses.append(loss)
        if "skip" in (self.on_nan, self.on_spike):
            pl_module.log("train/skipped_steps", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know to judge as this one."""
        return {"losses": list(self._losses), "skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._losses = deque(state_dict["losses"], maxlen=self._losses.maxlen)
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        """Put what was found beside the state before a bad step."""
        if self._found is not None:
            checkpoint[BAD_STEP] = self._found

    def _limit(self) -> float:
        if len(self._losses) < (self._losses.maxlen or 0):
            return math.inf
        mean = fmean(self._losses)
        return mean + max(self.spike_std * pstdev(self._losses, mean), self.spike_rise)

    def _act(
        self, option: str, reason: str, trainer: Trainer, optimizer: Optimizer, micro_batches: list[dict[str, Any]]
    ) -> None:
        action = getattr(self, option)
        samples = sorted({sample for micro_batch in micro_batches for sample in micro_batch["samples"]})
        some = ", ".join(map(str, samples[:_SHOWN])) + (f" and {len(samples) - _SHOWN} more" * bool(samples[_SHOWN:]))
        where = f"step {trainer.global_step}: {reason}" + f" (training samples {some})" * bool(samples)
        self._in_a_row += action == "skip"
        if action == "warn":
            rank_zero_warn(where)
        elif action == "skip" and self._in_a_row <= self.max_skipped:
            self.skipped += 1
            # AdamW passes over parameters without a gradient; a gradient of 0 would still move them
            optimizer.zero_grad(set_to_none=True)
            rank_zero_warn(f"{where}; skipped, {self.skipped} so far")
        else:
            self._found = {"step": trainer.global_step, "reason": reason, "micro_batches": micro_batches}
            self._stop(trainer, where, option)

    def _stop(self, trainer: Trainer, where: str, option: str) -> NoReturn:
        path = run_folder(trainer) / f"bad-step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._found = None
        many, leave_out = f", after {self.max_skipped} skipped steps in a row", ""
        if getattr(self, option) == "stop":
            many, leave_out = "", f", or leave the step out with --ckpt_path {path} --guard.{option} skip"
        raise BadStepError(
            f"{where}{many}. {path} holds the state before it and the batch. Lower model.optimizer.peak_lr and go back"
            f" to an earlier checkpoint, or mend the data{leave_out}"
        )

    def _describe(
        self, trainer: Trainer, micro_batches: list[tuple[int, Batch, Tensor]], limit: float
    ) -> list[dict[str, Any]]:
        """The micro batches of all ranks whose own loss is bad; all of the step, if none is."""
        own = [
            {
                "rank": trainer.global_rank, "batch_idx": batch_idx, "loss": _per_target(loss, batch),
                "samples": sample_numbers(trainer, batch_idx), "batch": {name: x.cpu() for name, x in batch.items()},
            }
            for batch_idx, batch, loss in micro_batches if DataRank.of(trainer).writes
        ]  # fmt: skip
        parts = [own]
        if trainer.world_size > 1:
            parts = [[]] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        every = [micro_batch for part in parts for micro_batch in part]
        return [found for found in every if not found["loss"] <= limit or math.isinf(found["loss"])] or every


def _per_target(loss: Tensor, batch: Batch) -> float:
    """The mean loss of the counted targets of a micro batch, from what its training step gives."""
    counted = int((batch["labels"] != IGNORED).sum())
    return float(loss) * batch["labels"].numel() / max(counted, 1)
