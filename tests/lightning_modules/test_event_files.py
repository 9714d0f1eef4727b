"""What a run has logged is read back whole, and what was logged again counts once."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_modules.event_files import read_scalars


def test_steps_that_were_made_again_count_once(tmp_path: Path) -> None:
    for start, steps in enumerate((range(6), range(4, 9))):
        with SummaryWriter(tmp_path, filename_suffix=f".{start}") as writer:
            for step in steps:
                writer.add_scalar("train/loss", 10 * start + step, step, walltime=100 * start + step)
            writer.add_scalar("val/loss", start, 3 + start, walltime=100 * start + 50)
    found = read_scalars(tmp_path)
    loss = found[found.tag == "train/loss"]
    assert list(loss.step) == list(range(9))
    assert list(loss.value) == [0, 1, 2, 3, 14, 15, 16, 17, 18]
    assert list(found[found.tag == "val/loss"].step) == [3, 4]


def test_more_values_than_tensorboard_keeps_by_itself(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in range(12_000):
            writer.add_scalar("train/loss", step, step)
    assert len(read_scalars(tmp_path)) == 12_000


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no event files of TensorBoard"):
        read_scalars(tmp_path)
