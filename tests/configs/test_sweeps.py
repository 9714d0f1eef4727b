"""Every shipped sweep: fit would take all its runs, and those of the evidence are as large as docs/results.md says."""

from pathlib import Path

import pytest
import torch
import yaml

from rat import CausalLM, ModelConfig
from rat_cli.grid import Grid
from rat_cli.sweep_results import Run

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(path for path in ROOT.glob("configs/ablation/*.yaml") if path.name != "language.yaml")


@pytest.fixture
def grid(path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load(path.read_text())
    return Grid(
        name=given["name"], fit=list(map(Path, given["fit"])), variants=given["variants"], seeds=given["seeds"],
        options=given.get("options", {}), lengths=given.get("lengths"), runs=Path("runs"), output=Path(given["output"]),
        devices=None, num_nodes=None,
    )  # fmt: skip


def model(grid: Grid, run: Run) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(ModelConfig(**grid.config(run)["model"]["model"]))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_is_one_that_fit_takes(grid: Grid, path: Path) -> None:
    assert (grid.name, grid.output) == (path.stem, Path("docs/results", path.stem))
    assert all(model(grid, run).num_parameters() > 0 for run in grid)


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.stem in ("chunk_size", "positions")], ids=str)
def test_language_models_have_a_million_weights_and_see_five_million_tokens(grid: Grid) -> None:
    for run in grid:
        config, made = grid.config(run), model(grid, run)
        tokens = config["trainer"]["max_steps"] * config["model"]["global_batch_size"] * made.config.max_seq_len
        assert made.num_parameters() - made.embedding.weight.numel() >= 1e6
        assert tokens >= 5e6


@pytest.mark.parametrize("path", [ROOT / "configs/ablation/chunk_size.yaml"], ids=["chunk_size"])
def test_the_chunk_sizes_are_those_between_the_ends(grid: Grid) -> None:
    found = {run.variant: model(grid, run).config for run in grid}
    sizes = {config.chunk_size for config in found.values() if config.pattern == ("rat",)}
    assert sizes == {1, 4, 16, 64, found["attention"].max_seq_len}
    patterns = {" ".join(config.pattern) for config in found.values()}
    assert patterns == {"attention", "rnn", "rat", "rat sliding_window", "attention sliding_window"}
    assert grid.seeds == [0, 1, 2]


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.stem.endswith("_200m")], ids=lambda path: path.stem)
def test_the_papers_ablations_are_as_large_as_they_say(grid: Grid) -> None:
    for run in grid:
        config = grid.config(run)
        tokens = config["trainer"]["max_steps"] * config["model"]["global_batch_size"] * 4096
        assert 10e9 <= tokens < 10.01e9
        assert 1.8e8 < model(grid, run).num_parameters() < 2.3e8
