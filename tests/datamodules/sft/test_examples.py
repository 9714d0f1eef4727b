from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.sft.examples import Examples
from datamodules.shards import ShardError, ShardWriter


def write(folder: Path, shard_tokens: int = 4) -> Path:
    """Three examples: [1 2] [3 0], [4] [5 6 0], [7 8 9] [0]."""
    with ShardWriter(folder, vocab_size=10, eos_id=0, tokenizer_sha256="a" * 64, shard_tokens=shard_tokens) as writer:
        writer.write([1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0])
    np.save(folder / "examples.npy", np.array([[2, 2], [1, 3], [3, 1]], dtype=np.uint32))
    return folder


@pytest.mark.parametrize("shard_tokens", [3, 100])
def test_prompts_and_answers(tmp_path: Path, shard_tokens: int) -> None:
    examples = Examples(write(tmp_path / "a", shard_tokens))
    found = [[part.tolist() for part in examples[i]] for i in range(len(examples))]
    assert found == [[[1, 2], [3, 0]], [[4], [5, 6, 0]], [[7, 8, 9], [0]]]
    assert examples.eos_id == 0


def resave(array: object) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "examples.npy", array)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "examples.npy").unlink(), "examples.npy does not exist.* not prompts.*prepare sft"),
        (lambda folder: (folder / "examples.npy").write_bytes(b""), "examples.npy is damaged"),
        (resave(np.array([[2, 2], [1, 3]], np.uint32)), "examples.npy is of 8 tokens and the shards .* hold 12: one"),
        (resave(np.array([[2, 2], [1, 3], [4, 0]], np.uint32)), "all above 0"),
        (resave(np.array([4, 4, 4], np.uint32)), r"holds \(3,\) uint32, not the \(N, 2\)"),
        (resave(np.array([[2.0, 2], [1, 3], [3, 1]])), r"holds \(3, 2\) float64"),
        (lambda folder: (folder / "index.json").unlink(), "has lost its index.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(write(tmp_path / "a", 100))
    with pytest.raises(ShardError, match=message):
        Examples(tmp_path / "a")


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a") / "examples.npy"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ShardError, match=r"examples.npy is damaged"):
        Examples(tmp_path / "a")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"a does not exist; make it with: python cli.py prepare sft"):
        Examples(tmp_path / "a")
    with pytest.raises(ShardError, match="another tokenizer"):
        Examples(write(tmp_path / "b"), "b" * 64)
