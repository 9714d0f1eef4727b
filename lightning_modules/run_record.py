"""What a run leaves for those who look at it later: a summary for programs, and the errors of every rank."""

import json
import math
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.atomic import replacing
from lightning_modules.run_folder import environment, peak_memory, reached_end, run_folder, sample_numbers
from rat.benchmarks.provenance import code_version

SUMMARY = "summary.json"


class RunRecord(Callback):
    """Keeps `summary.json` in the run's folder, and writes what ends a rank to `errors/rank-R.log`.

    The summary is written anew, whole or not at all, when training starts, after every validation, at every checkpoint
    and at the end. One that says running and is not updated was killed. It holds

    - status: running, finished, stopped (by a signal, by hand, or before its end by a callback), or failed; error: the
      first line of what it failed with; updated: when this was written, UTC;
    - steps (of the optimiser, those skipped included), max_steps, samples, tokens: so far, over all devices;
    - val_loss: {last, best, best_step}, nats per token, or null where nothing was validated;
    - training_seconds: without validation, of all starts; tokens_per_second: of the last start; peak_memory: bytes, of
      rank 0 of the last start; skipped_steps;
    - restarts, and `starts`: of each its time, status, error, first_step, last_step, training_seconds, code (package,
      commit, dirty), environment and data (checksums of the shards, by split).

    A run that goes on in its folder keeps the starts before.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._starts: list[dict[str, Any]] = []
        self._val_loss: dict[str, float | int] | None = None
        self._since: float | None = None
        self._tokens_per_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while all ranks are here to agree on it."""
        if not trainer.fast_dev_run:
            self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on after the starts before."""
        if self._folder is None or not trainer.is_global_zero:
            return
        before = read_summary(self._folder)
        self._starts = before.get("starts", [])
        for start in self._starts:
            if start["status"] == "running":
                start["status"] = "killed"
        # what was validated before belongs to other weights, if this training starts from the beginning
        self._val_loss = before.get("val_loss") if trainer.global_step else None
        self._tokens_per_step = before.get("tokens", 0) // (before.get("steps") or 1)
        self._starts.append(
            {
                "time": _now(), "status": "running", "error": None, "first_step": trainer.global_step,
                "last_step": trainer.global_step, "training_seconds": 0.0, "code": code_version(),
                "environment": environment(trainer), "data": getattr(trainer.datamodule, "checksums", None),
            }
        )  # fmt: skip
        self._since = time.monotonic()
        self._write(trainer, "running")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Know how many tokens a step takes."""
        self._tokens_per_step = pl_module.tokens_per_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the time rest."""
        self._rest()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the loss."""
        if not self._starts:
            return
        self._since = time.monotonic()
        if "val/loss" in trainer.callback_metrics:
            loss, step = float(trainer.callback_metrics["val/loss"]), trainer.global_step
            best = self._val_loss
            if best is None or not best["best"] <= loss:
                best = {"best": loss, "best_step": step}
            self._val_loss = {"last": loss, "best": best["best"], "best_step": best["best_step"]}
        self._write(trainer, "running")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep up with the checkpoints."""
        self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say whether training has come to its end; a run that was killed after its last save has done so now."""
        if self._starts:
            self._write(trainer, "finished" if reached_end(trainer) else "stopped")
        elif self._folder is not None and trainer.is_global_zero and reached_end(trainer):
            before = read_summary(self._folder)
            if before.get("starts") and before["status"] != "finished" and before["steps"] == trainer.global_step:
                before["starts"][-1]["status"] = before["status"] = "finished"
                self._keep(before)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down what ends this rank, before it ends."""
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            self._write(trainer, "stopped")
            return
        lines = str(exception).splitlines() or [""]
        self._write(trainer, "failed", f"{type(exception).__name__}: {lines[0]}")
        if self._folder is not None:
            _log_error(self._folder / "errors" / f"rank-{trainer.global_rank}.log", trainer, exception)

    def _rest(self) -> None:
        if self._since is not None:
            self._starts[-1]["training_seconds"] += time.monotonic() - self._since
            self._since = None

    def _write(self, trainer: Trainer, status: str, error: str | None = None) -> None:
        if not self._starts or self._folder is None:
            return
        start = self._starts[-1]
        if self._since is not None:
            self._rest()
            self._since = time.monotonic()
        start |= {"status": status, "error": error, "last_step": trainer.global_step}
        position = trainer.datamodule.state_dict() if trainer.datamodule else {}
        tokens = trainer.global_step * self._tokens_per_step
        made = tokens - start["first_step"] * self._tokens_per_step
        skipped = [getattr(callback, "skipped", 0) for callback in trainer.callbacks]
        summary = {
            "status": status, "error": error, "updated": _now(),
            "steps": trainer.global_step, "max_steps": trainer.max_steps,
            "samples": position.get("samples_in_all_epochs"), "tokens": tokens, "val_loss": self._val_loss,
            "training_seconds": sum(start["training_seconds"] for start in self._starts),
            "tokens_per_second": made / max(start["training_seconds"], 1e-9),
            "peak_memory": peak_memory(trainer.strategy.root_device), "skipped_steps": sum(skipped),
            "restarts": len(self._starts) - 1, "starts": self._starts,
        }  # fmt: skip
        self._keep(summary)

    def _keep(self, summary: dict[str, Any]) -> None:
        assert self._folder is not None
        try:
            with replacing(self._folder / SUMMARY) as partial:
                partial.write_text(json.dumps(_json(summary), indent=2) + "\n")
        except OSError as full:  # such as a full disk: no reason to lose the run
            rank_zero_warn(f"{self._folder / SUMMARY} is not up to date: {full}")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the run in `folder`; empty where there is none."""
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else {}


def _log_error(path: Path, trainer: Trainer, exception: BaseException) -> None:
    batch_idx = trainer.fit_loop.batch_idx
    samples = sample_numbers(trainer, batch_idx) if batch_idx >= 0 else []
    place = f"step {trainer.global_step}, epoch {trainer.current_epoch}, micro batch {batch_idx}, samples {samples}"
    text = "".join(traceback.format_exception(exception))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{_now()} rank {trainer.global_rank}: {place}\n{text}\n")
    except OSError as full:
        print(f"{path} could not be written: {full}")


def _json(value: Any) -> Any:
    """`value` as JSON knows it, which has no NaN."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
