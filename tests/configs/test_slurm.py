"""The job scripts do what they say, in the environment that SLURM would give them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.pretraining import merge, prepare_pretrain
from datamodules.shards import TokenShards

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "slurm" / "prepare.sbatch"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}


def test_an_array_of_workers_and_a_merge(environment: dict[str, str], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = [json.dumps({"text": f"Text number {i}, " + "again and " * (i % 9)}) + "\n" for i in range(300)]
    (texts / "a.jsonl").write_text("".join(rows))
    (texts / "b.jsonl").write_text("".join(reversed(rows)))
    options = {"vocab_size": 280, "held_out": 0.1, "num_processes": 1}
    prepare_pretrain(tmp_path / "alone", str(texts), **options)  # type: ignore[arg-type]
    given = ["--output", tmp_path / "array", "--source", texts, "--tokenizer", tmp_path / "alone", "--held_out", "0.1"]
    for task in range(2):
        own = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        subprocess.run(["bash", str(SCRIPT), *map(str, given)], env=environment | own, check=True, capture_output=True)
    merge(tmp_path / "array")
    for split in ("train", "val"):
        shas = [
            [file.sha256 for file in TokenShards(tmp_path / name / split).index.files] for name in ("alone", "array")
        ]
        assert shas[0] == shas[1]


def test_without_an_array_it_says_what_to_do(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "submit this with --array=0-N" in done.stderr
