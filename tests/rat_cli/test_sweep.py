"""A sweep trains what is not finished, goes on where it was, keeps records, and refuses what would spoil them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from rat import CausalLM
from rat_cli.sweep import share_of_gpus, visible_gpus
from rat_cli.sweep_results import read_curves, read_positions, read_runs, write_tables

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[2]
VARIANTS = {
    "attention": {"model.model.pattern": ["attention"]},
    "rat-L2": {"model.model.pattern": ["rat"], "model.model.chunk_size": 2},
}


@pytest.fixture
def grid(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file of a sweep over VARIANTS and two seeds, with changes."""

    def make(**changes: Any) -> Path:
        content = {
            "name": "grid", "fit": [str(tiny)], "variants": VARIANTS, "seeds": [0, 1], "lengths": [8, 32],
            "runs": str(tmp_path / "runs"), "output": str(tmp_path / "results"),
        }  # fmt: skip
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content | changes))
        return tmp_path / "grid.yaml"

    return make


def test_one_run_after_the_other_by_number(cli: Cli, grid: Callable[..., Path], tmp_path: Path) -> None:
    file, output = grid(), tmp_path / "results"
    listed = cli("sweep", "--config", file, "--dry_run").out.split("\n")
    assert [line.split() for line in listed[:-1]] == [
        ["0", "attention-s0", "to", "do"], ["1", "rat-L2-s0", "to", "do"],
        ["2", "attention-s1", "to", "do"], ["3", "rat-L2-s1", "to", "do"],
    ]  # fmt: skip
    for index in (3, 0):
        result = cli("sweep", "--config", file, "--index", index)
        assert result.code == 0, result.err
    runs = read_runs(output)
    assert list(runs.run) == ["attention-s0", "rat-L2-s1"]
    assert list(runs.pattern) == ["attention", "rat"]
    assert list(runs.seed) == [0, 1]
    assert list(runs.steps) == [2, 2]
    assert list(runs.tokens) == [2 * 4 * 16] * 2
    model = CausalLM.from_pretrained(tmp_path / "runs" / "grid" / "rat-L2-s1" / "model")
    row = runs.iloc[1]
    assert model.config.chunk_size == row.chunk_size == 2
    assert row.parameters == model.num_parameters()
    assert row.non_embedding_parameters == model.num_parameters() - model.embedding.weight.numel()
    assert row.cache_bytes == model.cache_bytes(16)
    config = yaml.safe_load((output / "rat-L2-s1" / "config.yaml").read_text())
    assert (config["seed_everything"], config["data"]["init_args"]["seed"]) == (1, 1)
    curves = read_curves(output)
    last = curves[(curves.run == "rat-L2-s1") & (curves.tag == "val/loss")].value.iloc[-1]
    assert last == pytest.approx(row["val/loss"])
    positions = read_positions(output)
    assert set(positions.run) == {"attention-s0", "rat-L2-s1"}
    assert positions["last"].max() == 32
    assert "finished" in cli("sweep", "--config", file, "--dry_run").out.split("\n")[0]


def test_what_is_finished_is_not_trained_again(cli: Cli, grid: Callable[..., Path], tmp_path: Path) -> None:
    file = grid(seeds=[0], lengths=None)
    for index in (0, 1):
        cli("sweep", "--config", file, "--index", index)
    runs = tmp_path / "runs" / "grid"
    for path in sorted(runs.rglob("*"), reverse=True):  # the records are enough
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "results" / "table.md").unlink()
    result = cli("sweep", "--config", file, "--table_only")
    assert result.code == 0, result.err
    page = (tmp_path / "results" / "table.md").read_text()
    assert page in result.out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert [row[0] for row in rows] == ["variant", "---", "attention", "rat-L2"]
    table = pd.read_csv(tmp_path / "results" / "table.csv")
    assert float(rows[2][rows[0].index("val/loss")]) == pytest.approx(table["val/loss"][0], rel=1e-3)
    result = cli("sweep", "--config", file)
    assert result.code == 0, result.err
    assert not list(runs.rglob("*.ckpt"))


def test_means_are_over_seeds(cli: Cli, grid: Callable[..., Path], tmp_path: Path) -> None:
    file = grid(variants={"rnn": {"model.model.pattern": ["rnn"]}}, lengths=None)
    for index in (0, 1):
        cli("sweep", "--config", file, "--index", index)
    results = tmp_path / "results"
    shutil.copytree(results / "rnn-s1", results / ".rnn-s2.partial")  # as a kill leaves it
    losses = read_runs(results)["val/loss"]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    row = (results / "table.md").read_text().splitlines()[-1]
    assert f"| {losses.mean():.3f} ± {losses.std():.3f} |" in row


def test_tasks_that_end_together_write_one_table_after_the_other(tmp_path: Path) -> None:
    records = ROOT / "docs" / "results" / "recall"
    for record in records.glob("attention-s*"):
        (tmp_path / record.name).symlink_to(record)
    with ThreadPoolExecutor(8) as pool:
        tables = [*pool.map(write_tables, [tmp_path] * 32)]
    assert set(tables) == {(tmp_path / "table.md").read_text()}
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def sweeping(file: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cli.py"), "sweep", "--config", str(file), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on_to_the_same_weights(
    number: int, grid: Callable[..., Path], tmp_path: Path
) -> None:
    steps = {"trainer.max_steps": 60, "model.val_every_n_steps": 30}
    wanted = {"seeds": [0], "options": steps}
    file = grid(runs=str(tmp_path / "whole"), output=str(tmp_path / "all"), **wanted)
    _, err = (whole := sweeping(file, "--jobs", "2")).communicate()
    assert whole.returncode == 0, err
    file = grid(**wanted)
    process = sweeping(file, "--jobs", "2")
    reached = tmp_path / "runs" / "grid" / "rat-L2-s0" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 300
    while not reached.exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == {signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}[signal.Signals(number)], err
    end = time.monotonic() + 300
    while (process := sweeping(file, "--jobs", "2")).communicate(timeout=300) and process.returncode:
        assert time.monotonic() < end  # those that a killed sweep leaves behind are still at work
    for run in ("attention-s0", "rat-L2-s0"):
        found, expected = (
            torch.load(tmp_path / runs / "grid" / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for runs in ("runs", "whole")
        )
        for key, x in found.items():
            torch.testing.assert_close(x, expected[key], rtol=0, atol=0, msg=f"{run} {key}")
    assert (tmp_path / "results" / "attention-s0" / "scalars.csv").is_file()


def test_a_run_that_fails_is_named_after_the_others(
    cli: Cli, grid: Callable[..., Path], tmp_path: Path, random_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as OMP_NUM_THREADS=1 makes it be
    (tmp_path / "empty").mkdir()
    variants = {
        "wide": {"data.init_args.path": str(tmp_path / "empty")},
        "good": {"data.init_args.path": str(random_shards)},
    }
    result = cli("sweep", "--config", grid(variants=variants, seeds=[0], lengths=None))
    assert result.code == 1
    log = tmp_path / "runs" / "grid" / "wide-s0" / "fit.log"
    assert f"1 of the runs did not end well; the same call goes on: wide-s0 ({log})" in result.err
    assert f"{tmp_path / 'empty'}" in log.read_text()
    assert list(read_runs(tmp_path / "results").run) == ["good-s0"]
    assert (tmp_path / "results" / "table.md").read_text() in result.out, "of those that did end well"
    summary = json.loads((tmp_path / "runs" / "grid" / "good-s0" / "summary.json").read_text())
    assert summary["starts"][-1]["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--index", "4"], "index must be from 0 to 3, since the sweep has 4 runs; got 4"),
        ({"seeds": [1, 1]}, [], "seeds must differ"),
        ({"seeds": [-1]}, [], "seeds must be at least 0, got [-1]"),
        ({"variants": {}}, [], "a sweep needs variants"),
        ({}, ["--jobs", "0"], "jobs must be at least 1, got 0"),
        ({"variants": {"a": {"model.model.chunk_sise": 2}}}, [], "did you mean --model.model.chunk_size?"),
        ({"variants": {"a": {"model.model.chunk_sise": 2}}}, [], "this is of the variant a\n"),
        ({"variants": {"a/b": {}}}, [], "got 'a/b'"),
        ({"variants": {".a": {}}}, [], "got '.a'"),
        ({"name": ".."}, [], "got '..'"),
        ({"variants": {"a": {"model.model.chunk_size": 0}}}, [], "chunk_size"),
        ({"fit": ["nowhere.yaml"]}, [], "nowhere.yaml"),
        ({"options": {"data.init_args.path": "nowhere"}}, [], "attention-s0 would read nowhere, which is not there: "),
        ({"options": {"data.init_args.path": "nowhere"}}, ["--index", "1"], "rat-L2-s0 would read nowhere, which is "),
        ({"lengths": [8, 600]}, [], "fewer than the seq_len + 1 = 601 of a sample"),
        ({"options": {"trainer.callbacks": None}}, [], "lengths are of exported models: add lightning_modules.Export"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_at_once(
    cli: Cli, grid: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], options: list[str], message: str
) -> None:
    result = cli("sweep", "--config", grid(**changes), *options)
    assert result.code in (1, 2)
    assert message in result.err
    assert not (tmp_path / "runs").exists()


def test_a_record_of_other_options_is_not_taken_for_this_one(
    cli: Cli, grid: Callable[..., Path], tmp_path: Path
) -> None:
    cli("sweep", "--config", grid(lengths=None), "--index", 0)
    result = cli("sweep", "--config", grid(options={"trainer.max_steps": 3}), "--dry_run")
    assert result.code == 1
    assert f"{tmp_path / 'results' / 'attention-s0'} holds a run with trainer.max_steps 2 instead of 3" in result.err
    readers = grid(lengths=None, options={"data.init_args.num_workers": 1})
    assert "finished" in cli("sweep", "--config", readers, "--dry_run").out, "it was another way to read the same"


def test_a_record_of_other_lengths_is_not_taken_for_this_one(
    cli: Cli, grid: Callable[..., Path], tmp_path: Path
) -> None:
    cli("sweep", "--config", grid(), "--index", 0)
    assert cli("sweep", "--config", grid(lengths=[32, 8]), "--dry_run").code == 0
    result = cli("sweep", "--config", grid(lengths=[8, 16]), "--dry_run")
    assert result.code == 1
    assert f"{tmp_path / 'results' / 'attention-s0'} was evaluated at the lengths [8, 32]: " in result.err


def test_records_of_two_texts_are_no_comparison(cli: Cli, grid: Callable[..., Path], tmp_path: Path) -> None:
    for index in (0, 1):
        cli("sweep", "--config", grid(lengths=None), "--index", index)
    summary = tmp_path / "results" / "rat-L2-s0" / "summary.json"
    content = json.loads(summary.read_text())
    content["starts"][-1]["data"]["val"] = 64 * "0"
    summary.write_text(json.dumps(content))
    result = cli("sweep", "--config", grid(lengths=None), "--dry_run")
    assert result.code == 1
    assert f"rat-L2-s0 and attention-s0 in {tmp_path / 'results'} read different texts from " in result.err


def test_text_that_the_records_have_not_read_is_refused_before_training(
    cli: Cli, grid: Callable[..., Path], tmp_path: Path
) -> None:
    cli("sweep", "--config", grid(lengths=None), "--index", 0)
    summary = tmp_path / "results" / "attention-s0" / "summary.json"
    content = json.loads(summary.read_text())
    content["starts"][-1]["data"]["train"] = 64 * "0"
    summary.write_text(json.dumps(content))
    result = cli("sweep", "--config", grid(lengths=None), "--index", 1)
    assert result.code == 1
    assert f"train is not the text that attention-s0 in {tmp_path / 'results'} has read" in result.err
    assert not (tmp_path / "runs" / "grid" / "rat-L2-s0").exists()


def test_records_of_no_run_are_told(cli: Cli, grid: Callable[..., Path]) -> None:
    for index in (0, 1):
        cli("sweep", "--config", grid(lengths=None), "--index", index)
    assert "note:" not in cli("sweep", "--config", grid(lengths=None), "--table_only").out
    less = grid(lengths=None, variants={"attention": VARIANTS["attention"]})
    assert "note: rat-L2-s0 in " in cli("sweep", "--config", less, "--table_only").out


def test_jobs_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [share_of_gpus(place, 2, ["0", "1", "2", "3"]) for place in (0, 1)] == [["0", "2"], ["1", "3"]]
    assert [share_of_gpus(place, 3, ["4", "5"]) for place in (0, 1, 2)] == [["4"], ["5"], ["4"]]
    assert share_of_gpus(1, 2, []) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-1")
    assert visible_gpus() == ["3", "MIG-1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_table_of_nothing_says_so(cli: Cli, grid: Callable[..., Path], tmp_path: Path) -> None:
    result = cli("sweep", "--config", grid(), "--table_only")
    assert result.code == 1
    assert f"{tmp_path / 'results'} holds no record of a run" in result.err
