"""Stopping where nothing is lost, whoever asks for it, and going on in the same SLURM job."""

import contextlib
import os
import signal
import subprocess
import time
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_modules.checkpoints import LastCheckpoint
from lightning_modules.run_folder import reached_end
from lightning_modules.slurm import end_of_job, job_id, requeue

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_PATIENCE = 1.0  # seconds in which a second Ctrl-C is an echo of the first: torchrun passes on what its group gets
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """Training was stopped before its end and saved, on all ranks after the same optimiser step; exit status 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Preemption(Checkpoint):
    """Save and stop when any rank gets SIGUSR1, SIGTERM or Ctrl-C, or the SLURM job nears its end; requeue that job.

    A signal is only remembered. When an optimiser step is done, all ranks together ask whether one of them has one
    (an all-reduce of a number a step), so that they save and stop after the same step however far apart they are. The
    checkpoint is that of `LastCheckpoint`; `--ckpt_path last` goes on from it. The process ends with status 75. Signals
    that were blocked before wait for training to begin. A second Ctrl-C ends at once, and saves nothing. As a
    `Checkpoint`, this runs after the other callbacks.

    `cli.py fit` adds this callback wherever there is a `LastCheckpoint`.

    Args:
        margin: minutes before the end of a SLURM job to stop at. A step, a validation and a save have to fit in.

    Raises:
        ValueError: if nothing would save, or the job is shorter than `margin`.
    """

    def __init__(self, margin: float = 3.0) -> None:
        if margin < 0:
            raise ValueError(f"Preemption's margin is in minutes and at least 0, got {margin}")
        self.margin = margin
        self._signal: signal.Signals | None = None
        self._interrupted: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._deadline: float | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals, and ask how long the job may run."""
        if stage != "fit":
            return
        if not any(isinstance(saver, LastCheckpoint) for saver in trainer.checkpoint_callbacks):
            raise ValueError("Preemption needs a LastCheckpoint to save with: add it to the callbacks")
        # Lightning's own handler of SIGTERM starts a broadcast in the middle of whatever a rank is doing.
        trainer._signal_connector.register_signal_handlers = lambda: None
        self._signal = self._interrupted = None
        self._handlers = {number: signal.signal(number, self._remember) for number in (*SIGNALS, signal.SIGINT)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if job_id() is not None and trainer.is_global_zero:
            self._read_deadline()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know where training begins."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks if one of them is to stop, once the gradients that were accumulated have been used.

        After the last step there is nothing left to stop: training ends by itself.
        """
        if trainer.global_step == self._step or reached_end(trainer):
            return
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._is_to_stop(), all=False):
            self._stop(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, but for a process that is about to end: a second one must not cut that short."""
        if not isinstance(exception, Preempted):
            self._give_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back(trainer)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > _PATIENCE:
                raise KeyboardInterrupt
            if self._interrupted is None and rank_zero_only.rank == 0:
                # to print may be what was interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once, without saving\n")
            self._interrupted = self._interrupted or now
        self._signal = signal.Signals(number)

    def _give_back(self, trainer: Trainer) -> None:
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _read_deadline(self) -> None:
        self._deadline = end_of_job() - 60 * self.margin
        left = (self._deadline - time.time()) / 60
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        rank_zero_info(f"SLURM job {job_id()}, requeued {restarts} times, trains for {left:.0f} minutes at most")
        if left <= 0:
            raise ValueError(
                f"the SLURM job ends in {left + self.margin:.0f} minutes, and Preemption stops {self.margin:g} minutes"
                " before the end: ask for more --time, or lower the callback's margin"
            )

    def _is_to_stop(self) -> bool:
        """Whether this rank has a reason. The end is asked for again when it seems near: it may have been put off."""
        if self._signal is None and self._deadline is not None and time.time() >= self._deadline:
            self._deadline = end_of_job() - 60 * self.margin
        return self._signal is not None or (self._deadline is not None and time.time() >= self._deadline)

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, LastCheckpoint):
                saver.on_train_end(trainer, pl_module)
        trainer.strategy.checkpoint_io.teardown()  # a save in the background ends first
        trainer._logger_connector.update_train_step_metrics()  # Lightning would log this step after its hooks
        for logger in trainer.loggers:
            logger.save()
        children = _release_children(trainer)
        trainer.strategy.barrier("saved before stopping")
        if trainer.is_global_zero:
            reason = self._signal.name if self._signal else "a signal to another rank, or the end of the job"
            done = "" if job_id() is None else ", requeued" if requeue() else ", not requeued: submit the job again"
            rank_zero_info(f"stopped after step {trainer.global_step} ({reason}), saved{done}")
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(60)
        raise Preempted


def _release_children(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning has started beside this one, which it would kill when one of them ends first."""
    watched = getattr(trainer.strategy.launcher, "procs", [])
    children = list(watched)
    watched.clear()
    return children
