"""Prompts and answers on disk: shards of tokens, and an `examples.npy` that says where each begins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.shards import ShardError, TokenShards

EXAMPLES, REFERENCES = "examples.npy", "references.jsonl"


class Examples:
    """The examples of a split, in order.

    Args:
        folder: made by `python cli.py prepare sft`: shards, in which every document is a prompt, its answer and an
            end of text, and `examples.npy`, (N, 2) uint32, the tokens of each prompt and each answer (which counts
            its end of text).
        tokenizer_sha256: if given, the tokenizer the shards must have been made with.

    Raises:
        ShardError: nothing there, damaged, or of another kind.
    """

    def __init__(self, folder: Path, tokenizer_sha256: str | None = None) -> None:
        if not folder.is_dir():
            raise ShardError(f"{folder} does not exist; make it with: python cli.py prepare sft --output FOLDER")
        self.shards = TokenShards(folder, tokenizer_sha256=tokenizer_sha256)
        if self.shards.index.eos_id is None:
            raise ShardError(f"{folder} has lost its index.json; prepare again with --overwrite true")
        self.eos_id = self.shards.index.eos_id
        self.lengths = _load(folder / EXAMPLES).astype(np.int64)
        if self.lengths.sum() != self.shards.num_tokens:
            raise ShardError(
                f"{folder / EXAMPLES} is of {self.lengths.sum()} tokens and the shards beside it hold"
                f" {self.shards.num_tokens}: one of them was cut short or changed; prepare again with --overwrite true"
            )
        self._starts = np.cumsum(self.lengths.sum(axis=1)) - self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The tokens of a prompt and of its answer, which ends with an end of text."""
        prompt, answer = self.lengths[number]
        tokens = np.empty((1, prompt + answer), self.shards.dtype)
        self.shards.read_into(self._starts[number : number + 1], tokens)
        return tokens[0, :prompt], tokens[0, prompt:]


def read_references(folder: Path, count: int) -> list[dict[str, Any]]:
    """The questions and all answers of a split's `count` examples, {index, input, answers}, in their order.

    Raises:
        ShardError: they are missing, damaged, or of another number of examples.
    """
    path = folder / REFERENCES
    try:
        references = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"{path} is missing or damaged ({error}); prepare again with --overwrite true") from None
    if len(references) != count:
        raise ShardError(f"{path} is of {len(references)} examples, not of {count}")
    return references


def _load(path: Path) -> NDArray[np.uint32]:
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist, so these are not prompts and answers but plain text: make them with python cli.py"
            " prepare sft, or take datamodules.tokens.TokenDataModule"
        )
    try:
        lengths = np.load(path)
    except (ValueError, EOFError) as error:
        raise ShardError(f"{path} is damaged ({error}); prepare again with --overwrite true") from error
    if lengths.dtype != np.uint32 or lengths.ndim != 2 or lengths.shape[1] != 2 or not lengths.all():
        raise ShardError(
            f"{path} holds {lengths.shape} {lengths.dtype}, not the (N, 2) uint32 lengths of prompts and answers, all"
            " above 0; prepare again with --overwrite true"
        )
    return lengths
