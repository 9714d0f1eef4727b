"""What `make tensorboard` shows of a fresh run, seen in a browser."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURES = runpy.run_path(str(ROOT / "docs/draw_tensorboard.py"))
RUN = "quickstart/rat"
SMALL = """
trainer:
  max_steps: 60
  log_every_n_steps: 5
  limit_val_batches: 4
  enable_progress_bar: false
  logger: {{init_args: {{save_dir: {folder}/runs}}}}
model:
  model: {{vocab_size: 300, d_model: 32, num_layers: 2, num_heads: 2, max_seq_len: 32}}
  val_every_n_steps: 20
data: {{init_args: {{path: {folder}/data, seq_len: 32}}}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PICTURES["missing"]() is not None, reason=str(PICTURES["missing"]())),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the quickstart's config, only smaller."""
    folder = tmp_path_factory.mktemp("tensorboard")
    (folder / "texts").mkdir()
    for i, path in enumerate(sorted((ROOT / "rat").rglob("*.py"))):
        (folder / "texts" / f"{i}.txt").write_text(path.read_text())
    (folder / "small.yaml").write_text(SMALL.format(folder=folder))
    data = "--vocab_size 300 --held_out 0.1 --num_processes 1"
    prepare = f"prepare pretrain --source {folder}/texts --output {folder}/data {data}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (prepare, f"fit --config configs/quickstart.yaml --config {folder}/small.yaml"):
        command = [sys.executable, "cli.py", *arguments.split()]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder / "runs"


@pytest.fixture(scope="module")
def shown(runs: Path) -> Iterator[Any]:
    """TensorBoard on it."""
    environment = [f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed", f"RUNS={runs}", "PORT=0"]
    command = ["make", f"--directory={ROOT}", "tensorboard", *environment]
    with PICTURES["serving"](command) as address, PICTURES["Page"](address) as opened:
        yield opened


def test_the_curves_of_the_run_are_there(shown: Any) -> None:
    shown.open("timeseries", "?tagFilter=(train|val)/loss")
    shown.wait(lambda: shown.curves() == {"train/loss": [RUN], "val/loss": [RUN]})


def test_the_layout_draws_every_chart(shown: Any) -> None:
    shown.open("custom_scalars")
    found = shown.wait(lambda: len(shown.charts()) == 9 and shown.charts())
    assert sorted(found["loss, nats per token"]) == [f"train/loss ({RUN})", f"val/loss ({RUN})"]
    assert found["norm of all gradients, before clipping"] == [f"train/grad_norm ({RUN})"]
    assert sorted(found["mean over channels and tokens, in tokens"]) == [
        f"memory_length_mean/layer_{i:02d} ({RUN})" for i in range(2)
    ]


def test_the_table_of_runs_holds_its_choices_and_last_metrics(shown: Any, runs: Path) -> None:
    shown.open("hparams")
    (row,) = shown.wait(lambda: [row for row in shown.trials() if row["val/loss"]])
    assert row["Trial ID"] == RUN
    assert (row["pattern"], float(row["chunk_size"]), float(row["peak_lr"])) == ("rat", 16, 3e-3)
    summary = json.loads((runs / RUN / "summary.json").read_text())
    assert float(row["val/loss"]) == pytest.approx(summary["val_loss"]["last"], rel=1e-3)
    assert float(row["train/device/items_per_sec"]) > 0


def test_texts_are_samples_of_every_validation_and_the_config(shown: Any, runs: Path) -> None:
    shown.open("text")
    tags = [(RUN, f"{name}/text_summary") for name in ("config", "samples/prompt_0", "samples/prompt_2")]
    found = shown.wait(lambda: all(shown.written().get(tag) for tag in tags) and shown.written())
    assert yaml.safe_load(found[tags[0]][0]) == yaml.safe_load((runs / RUN / "config.yaml").read_text())
    assert len(found[tags[1]]) == 3
    assert all(text.startswith("Return the") for text in found[tags[1]])
    assert all(text.startswith("Raises:\n    ValueError: if") for text in found[tags[2]])


def test_the_pictures_of_the_page_are_drawn(shown: Any, tmp_path: Path) -> None:
    PICTURES["draw"](shown, 1, tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(re.findall(r"\((tensorboard-.*\.png)\)", (ROOT / "docs/tensorboard.md").read_text()))
    for name in drawn:
        with Image.open(tmp_path / name) as picture, Image.open(ROOT / "docs" / name) as kept:
            assert picture.size == kept.size
            assert len(picture.getcolors()) > 10, "an empty page has fewer"
