"""Training and validation logic for Lightning: the module, its schedule, callbacks. Knows models, not data."""

from lightning_modules.callbacks import (
    ExportModel,
    LastCheckpoint,
    MemoryLengthHistogram,
    PredictionWriter,
    Throughput,
)
from lightning_modules.language_model import LanguageModel
from lightning_modules.schedule import OptimizerConfig

__all__ = [
    "ExportModel",
    "LanguageModel",
    "LastCheckpoint",
    "MemoryLengthHistogram",
    "OptimizerConfig",
    "PredictionWriter",
    "Throughput",
]
