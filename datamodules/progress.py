"""Where a Lightning Trainer stands in its data, read exactly, and set exactly when it resumes.

Lightning restores its own counters of micro batches, and guesses from them in which hook the checkpoint was
written. That goes wrong when the micro batch or the number of ranks has changed, when a checkpoint was
written within an accumulation (the gradients are gone) or after `max_steps` had cut an epoch short (the rest
of it is skipped), and with `max_steps` at the end of an epoch. So a resumed run gets its counters set from
the samples that were trained on.
"""

from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _Progress


class Position(NamedTuple):
    """An epoch, how many of its micro batches (on every rank) have been trained on, and of all epochs together."""

    epoch: int
    micro_batches: int
    total: int


def get_position(trainer: Trainer) -> Position:
    """Where training stands, whatever hook asks: batches whose gradients reached the optimiser count, no
    others.

    A finished epoch is given as the beginning of the next; an epoch that `max_steps` or an early stop cut
    short is not finished, one that the model chose to leave (`on_train_batch_start` returned -1) is.
    """
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    epoch, done, total = epochs.processed, batches.current.processed, batches.total.processed
    # the last batch is known as such before it is trained on
    left = batches.is_last_batch and done == batches.current.ready
    finished = left or done >= trainer.fit_loop.max_batches
    if epochs.started == epochs.processed:
        if finished or not done:
            return Position(epoch, 0, total)
        epoch -= 1
    elif finished:
        return Position(epoch + 1, 0, total)
    lost = done % trainer.accumulate_grad_batches
    return Position(epoch, done - lost, total - lost)


def set_position(trainer: Trainer, position: Position) -> None:
    """Make a Trainer whose loops are restored, and which asks for its training loader, go on from `position`."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch, done, total = position
    # the state of a checkpoint written in on_train_batch_end: Lightning completes the batch and goes on
    inside = int(done > 0)
    _set(fit.epoch_progress, epoch, epoch, started=epoch + inside, completed=epoch)
    _set(loop.batch_progress, done, total, completed=done - inside)
    loop.batch_progress.is_last_batch = False
    fit.restarting = bool(inside)
    # with max_steps Lightning reads every restart as one in the middle of an epoch
    fit._restarting = loop.restarting = bool(inside)
    if trainer.lightning_module.automatic_optimization:
        loop._batches_that_stepped = trainer.global_step - inside


def _set(progress: _Progress, done: int, total: int, *, completed: int, started: int | None = None) -> None:
    ahead = 0 if started is None else started - done
    for tracker, processed in ((progress.current, done), (progress.total, total)):
        tracker.ready = tracker.started = processed + ahead
        tracker.processed, tracker.completed = processed, processed + completed - done
