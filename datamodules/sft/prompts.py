"""Prompts to be answered, with what is needed to judge the answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.output_folder import RECORD
from datamodules.sampler import PADDING
from datamodules.sft.examples import Examples, read_references
from datamodules.shards import ShardError


class PromptDataset(Dataset[dict[str, Any]]):
    """The examples of a test split without their answers.

    It is indexed by a whole micro batch of example numbers (B,) and gives `prompts`, a list of (P,) int64 tensors;
    `references`, what is known of each prompt: {index, task, input, answers}; `eos_id`, which ends an answer, and
    `max_new_tokens`, the most that it may have. Examples numbered PADDING are left out.

    Args:
        examples: of the split.
        max_new_tokens: None takes those that room was left for when the data were prepared.

    Raises:
        ShardError: the references or the record of the preparation are missing or damaged.
    """

    def __init__(self, examples: Examples, max_new_tokens: int | None = None) -> None:
        self.examples = examples
        folder = examples.shards.folder
        made_with = _made_with(folder.parent / RECORD)
        task = made_with["task"] + (f" ({made_with['setting']})" if made_with["setting"] else "")
        self.max_new_tokens = max_new_tokens or made_with["max_new_tokens"]
        self.references = [{"task": task, **known} for known in read_references(folder, len(examples))]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, numbers: NDArray[np.int64]) -> dict[str, Any]:
        """The batch of the examples numbered `numbers` (B,)."""
        there = numbers[numbers != PADDING].tolist()
        return {
            "prompts": [torch.from_numpy(self.examples[i][0].astype(np.int64)) for i in there],
            "references": [self.references[i] for i in there],
            "eos_id": self.examples.eos_id,
            "max_new_tokens": self.max_new_tokens,
        }


def _made_with(path: Path) -> dict[str, Any]:
    try:
        made_with = json.loads(path.read_text())["made_with"]
        return {name: made_with[name] for name in ("task", "setting", "max_new_tokens")}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} does not tell the task and the length of its answers ({error}); prepare again with"
            " --overwrite true"
        ) from None
