"""Runs from the command line: one folder each, and bad steps that name the samples at fault."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import environment, free_port

from datamodules.dataset import make_batch
from datamodules.tokens import TokenDataModule
from lightning_modules import LanguageModel

Cli = Callable[..., Any]
Write = Callable[..., Path]

# One rank of two: NaN on rank 1 alone in step 1, a spike there in step 4.
RANK = """
import os
from lightning_modules import BadStepGuard, LanguageModel
from rat_cli.main import main

loss_of = LanguageModel._forward

def spoiled(self, batch, *args, **options):
    loss = loss_of(self, batch, *args, **options)
    factor = {1: float("nan"), 4: 50.0}.get(self.trainer.global_step, 1.0)
    return loss * factor if self.trainer.training and os.environ["RANK"] == "1" else loss

kept = []

def keep(self, *_):
    kept.append([x.detach().clone() for x in self.parameters()])

LanguageModel._forward, LanguageModel.on_train_batch_start = spoiled, keep
try:
    main()
finally:
    # steps of two micro batches
    assert all(x.equal(y) for x, y in zip(kept[2], kept[4]))
    assert not any(x.equal(y) for x, y in zip(kept[4], kept[6]))
    print("\\nweights", sum(float(x.double().abs().sum()) for x in kept[-1]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run" / "tiny"


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_one_folder_holds_all_of_a_run_and_of_those_that_go_on(cli: Cli, tiny: Path, run: Path) -> None:
    assert cli("fit", "--config", tiny).code == 0
    held = {path.name.partition(".")[0] for path in run.iterdir()}
    assert held == {"checkpoints", "config", "events", "hparams", "model", "summary"}
    first = summary(run)
    assert (first["status"], first["steps"], first["samples"], first["tokens"]) == ("finished", 2, 8, 8 * 16)
    assert all(first["starts"][0]["data"][split] for split in ("train", "val"))
    assert first["val_loss"]["last"] == pytest.approx(np.log(64), rel=0.1)
    config = (run / "config.yaml").read_text()
    assert cli("validate", "--config", tiny, "--ckpt_path", "last").code == 0
    assert (run / "config.yaml").read_text() == config, "only fit writes it"
    assert cli("info", "--config", run / "config.yaml").code == 0, "which says all that fit was told"
    for _ in range(2):  # the second time with the same config, of which no copy is kept
        assert cli("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", "4").code == 0
    assert (run / "config-1.yaml").read_text() == config
    assert not (run / "config-2.yaml").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    second = summary(run)
    assert (second["status"], second["steps"], second["samples"], second["restarts"]) == ("finished", 4, 16, 1)
    assert second["starts"][0] == first["starts"][0]
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]


def test_a_bad_step_names_its_samples_and_can_be_left_out(
    cli: Cli, tiny: Path, run: Path, random_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, bad_token = LanguageModel._forward, []

    def spoiled(self: LanguageModel, batch: dict[str, torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        loss, first = forward(self, batch, *args, **options), batch["input_ids"].flatten().tolist()
        if self.trainer.training and self.trainer.global_step == 2 and not bad_token:
            bad_token.append(first)
        return loss * float("nan") if bad_token and first == bad_token[0] else loss

    monkeypatch.setattr(LanguageModel, "_forward", spoiled)
    result = cli("fit", "--config", tiny, "--trainer.max_steps", "4")
    path = run / "bad-step-2.ckpt"
    (found,) = torch.load(path, weights_only=True)["bad_step"]["micro_batches"]
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: step 2: the loss is nan (training samples ")
    assert ", ".join(map(str, sorted(found["samples"]))) in result.err.splitlines()[-1]
    data = TokenDataModule(path=random_shards, seq_len=16, batch_size=2)
    batch = make_batch(data.dataset("train")[np.array(found["samples"])], data.eos_id)
    torch.testing.assert_close(batch, found["batch"], rtol=0, atol=0)
    log = (run / "errors" / "rank-0.log").read_text()
    assert "rank 0: step 2, epoch 0, micro batch 5" in log
    assert "BadStepError: step 2: the loss is nan" in log
    assert (summary(run)["status"], summary(run)["steps"]) == ("failed", 2)
    assert summary(run)["error"].startswith("BadStepError: step 2: the loss is nan")
    assert result.err.rstrip().endswith(f"or leave the step out with --ckpt_path {path} --guard.on_nan skip")
    result = cli("fit", "--config", tiny, "--trainer.max_steps", "4", "--ckpt_path", path, "--guard.on_nan", "skip")
    assert result.code == 0, result.err
    assert (summary(run)["skipped_steps"], summary(run)["steps"], summary(run)["status"]) == (1, 4, "finished")


def test_the_last_checkpoint_of_a_folder_that_changes_is_one_line(cli: Cli, tiny: Path, write: Write) -> None:
    extra = write("trainer: {logger: {init_args: {version: null}}}")
    result = cli("fit", "--config", tiny, "--config", extra, "--ckpt_path", "last")
    assert result.code == 1
    assert "set trainer.logger.init_args.version" in result.err


def test_ranks_judge_alike(tiny: Path, run: Path, tmp_path: Path, random_shards: Path, write: Write) -> None:
    port = free_port()
    options = {
        "trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 6, "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "true", "data.init_args.batch_size": 1,
        "guard.on_nan": "skip", "guard.spike_window": 2, "guard.spike_std": 3,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script = write(RANK, "rank.py")
    ranks = []
    for rank in range(2):
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        given = os.environ | environment(rank, 2, port) | own
        command = [sys.executable, str(script), "fit", "--config", str(tiny), *words]
        ranks.append(subprocess.Popen(command, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        (out, err), (other_out, other_err) = (rank.communicate(timeout=120) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], err + other_err
    assert "error: step 4: the loss leaps" in err
    assert "error:" not in other_err  # one line tells it, not one of every rank
    weights = [line for line in (out + other_out).splitlines() if line.startswith("weights ")]
    assert len(weights) == 2
    assert weights[0] == weights[1]
    assert "Epoch 0" in out + err
    assert "Epoch" not in other_out + other_err
    assert (summary(run)["status"], summary(run)["skipped_steps"]) == ("failed", 1)
    assert summary(run)["starts"][0]["environment"]["world_size"] == 2
    for rank in range(2):
        assert f"rank {rank}: step 4, epoch 0, micro batch 9" in (run / "errors" / f"rank-{rank}.log").read_text()
    data = TokenDataModule(path=random_shards, seq_len=16, batch_size=1)
    found = torch.load(run / "bad-step-4.ckpt", weights_only=True)["bad_step"]["micro_batches"]
    assert [(micro_batch["rank"], micro_batch["batch_idx"]) for micro_batch in found] == [(1, 8), (1, 9)]
    for micro_batch in found:
        batch = make_batch(data.dataset("train")[np.array(micro_batch["samples"])], data.eos_id)
        torch.testing.assert_close(batch, micro_batch["batch"], rtol=0, atol=0)
