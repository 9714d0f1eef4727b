"""docs/results.md shows what the records hold, and says of a claim what its rule says."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import write_results
from PIL import Image

from rat_cli.sweep_results import PAGE, TABLE, write_tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("written", write_results.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_records(written: Path) -> None:
    shown = dict(re.findall(r"<!-- begin (.+) -->\n\n(.*?)\n\n<!-- end \1 -->", written.read_text(), re.DOTALL))
    made = write_results.tables()
    assert shown == {
        name: "\n".join(made.get(name, write_results.NOTHING_YET)) for name in write_results.places(written)
    }
    assert shown


def test_every_table_has_a_place() -> None:
    there = {name for page in write_results.PAGES for name in write_results.places(page)}
    assert there >= set(write_results.tables())


@pytest.mark.parametrize("picture", ["language.png", "memory.png"])
def test_the_pictures_are_those_of_the_tables(picture: str) -> None:
    with Image.open(write_results.RESULTS / picture) as image:
        assert image.info["Source"] == write_results.drawn_from()


def test_language_models_have_read_one_text() -> None:
    read = [
        tuple(start["data"].items())
        for sweep in ("chunk_size", "positions")
        for path in (write_results.RESULTS / sweep).glob("*/summary.json")
        for start in json.loads(path.read_text())["starts"]
    ]
    assert len({*read}) == 1


@pytest.mark.parametrize("sweep", write_results.sweeps())
def test_every_record_is_in_its_table(sweep: str, tmp_path: Path) -> None:
    folder = write_results.RESULTS / sweep
    for record in folder.iterdir():
        if record.is_dir():
            (tmp_path / record.name).symlink_to(record)
    assert write_tables(tmp_path) == (folder / PAGE).read_text()
    assert (tmp_path / TABLE).read_text() == (folder / TABLE).read_text()


def test_runs_are_of_clean_commits_that_the_history_has() -> None:
    starts = [
        start["code"]
        for path in write_results.RESULTS.glob("*/*/summary.json")
        for start in json.loads(path.read_text())["starts"]
    ]
    assert starts
    assert not any(start["dirty"] for start in starts)
    listed = subprocess.run(["git", "rev-list", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or (ROOT / ".git" / "shallow").exists():
        pytest.skip("this is no whole clone")
    assert {start["commit"] for start in starts} <= set(listed.stdout.split())


def test_speeds_are_of_clean_commits_and_of_one_machine() -> None:
    efficiency, chunk_size = (
        [json.loads(path.read_text()) for path in (write_results.RESULTS / name).rglob("layer.json")]
        for name in ("efficiency", "chunk_size_speed")
    )
    assert (len(efficiency), len(chunk_size)) == (4, 15)
    reports = efficiency + chunk_size
    assert not [report["code"] for report in reports if report["code"]["dirty"] is not False]
    assert len({report["machine"]["processor"] for report in reports}) == 1


@pytest.mark.parametrize(
    ("differences", "allowance", "said"),
    [
        ([-0.20, -0.21, -0.22], 0.0, "holds"),
        ([0.20, 0.21, 0.22], 0.0, "does not hold"),
        ([-0.1, -0.2, -0.3], 0.0, "not told apart"),  # -0.2 +- 4.303 * 0.1 / sqrt(3) = 0.248
        ([-0.1, -0.2, -0.2], 0.0, "holds"),  # -0.167 +- 0.143
        ([-0.2, -0.1], 0.0, "too few seeds: 2"),
        ([0.005, 0.004, 0.006], 0.01, "holds"),
        ([0.0, 0.0, 0.0], 0.0, "not told apart"),
    ],
)
def test_a_verdict_is_of_the_interval(differences: list[float], allowance: float, said: str) -> None:
    assert write_results.verdict(differences, allowance) == said


def test_who_only_guesses_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(variant, seed, value) for seed in range(3) for variant, value in (("a", 0.20), ("b", 0.23))]
    table = pd.DataFrame(rows, columns=["variant", "seed", "value"])
    for guessed, said in ((0.222, "both guess"), (0.1, "holds")):
        monkeypatch.setattr(write_results, "MEASURES", {"x": write_results.Measure("x", lambda: table, guessed)})
        monkeypatch.setattr(write_results, "CLAIMS", [write_results.Claim("a before b", "", "x", "a", "b")])
        *_, row = write_results.claim_lines()
        assert row.endswith(f"| 3 | {said} |")


@pytest.mark.parametrize(
    ("apart", "seeds", "said"),
    [(0.0, 3, "not told apart"), (-0.2, 3, "they differ"), (0.2, 3, "they differ"), (-0.2, 2, "too few seeds: 2")],
)
def test_a_control_claims_nothing(apart: float, seeds: int, said: str) -> None:
    control = write_results.Claim("none", "", "loss", "a", "b", control=True)
    table = pd.DataFrame({"a": [1 + apart, 2 + apart, 3.01 + apart], "b": [1.0, 2.01, 3.0]})
    assert write_results.judged(control, table[:seeds], None) == said


def test_with_few_seeds_nothing_is_said_of_guessing() -> None:
    claim = write_results.Claim("a before b", "", "recall", "a", "b")
    table = pd.DataFrame({"a": [1.0, 1.0, 1.0], "b": [1.0, 0.99, 1.0]})
    assert write_results.judged(claim, table, 0.2) == "both solve it"
    assert write_results.judged(claim, table[:2], 0.2) == "too few seeds: 2"


def test_speed_is_told_with_its_rounds() -> None:
    assert write_results._times_as_fast([2.0, 3.0, 10.0], [1.0, 1.0, 2.0]) == "3.0x (2.0 to 5.0)"


def test_seeds_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", 0, 1.0), ("b", 0, 2.0), ("a", 1, 5.0), ("b", 1, 6.0), ("a", 2, 0.0), ("b", 2, 0.5), ("a", 3, 9.0)]
    table = pd.DataFrame(rows, columns=["variant", "seed", "value"])
    monkeypatch.setattr(write_results, "MEASURES", {"loss": write_results.Measure("loss", lambda: table)})
    monkeypatch.setattr(write_results, "CLAIMS", [write_results.Claim("a before b", "1, 2", "loss", "a", "b")])
    *_, row = write_results.claim_lines()
    assert row == "| a before b | 1, 2 | loss | a 2.000, b 2.833 | -0.833 ± 0.289 | 3 | holds |"
