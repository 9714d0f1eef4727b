"""Training and validation logic for Lightning: the module, its schedule, callbacks. Knows models, not data."""

from lightning_modules.bad_steps import BadStepGuard
from lightning_modules.callbacks import ExportModel, MemoryLengthHistogram, Throughput
from lightning_modules.checkpoints import BackgroundCheckpointIO, LastCheckpoint
from lightning_modules.dashboard import Dashboard
from lightning_modules.language_model import LanguageModel
from lightning_modules.predictions import PredictionWriter
from lightning_modules.preemption import Preemption
from lightning_modules.run_record import RunRecord
from lightning_modules.schedule import OptimizerConfig
from lightning_modules.sharding import FSDP2Strategy, FSDPStrategy
from lightning_modules.text_samples import TextSamples

__all__ = [
    "BackgroundCheckpointIO",
    "BadStepGuard",
    "Dashboard",
    "ExportModel",
    "FSDP2Strategy",
    "FSDPStrategy",
    "LanguageModel",
    "LastCheckpoint",
    "MemoryLengthHistogram",
    "OptimizerConfig",
    "PredictionWriter",
    "Preemption",
    "RunRecord",
    "TextSamples",
    "Throughput",
]
