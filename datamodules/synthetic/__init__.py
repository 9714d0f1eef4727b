"""Tasks that measure memory, made on the fly from a seed: nothing is downloaded, nothing is stored."""

from datamodules.synthetic.copying import Copying
from datamodules.synthetic.datamodule import SyntheticDataModule
from datamodules.synthetic.needles import Needles
from datamodules.synthetic.recall import Recall
from datamodules.synthetic.task import Sample, Task

__all__ = ["Copying", "Needles", "Recall", "Sample", "SyntheticDataModule", "Task"]
