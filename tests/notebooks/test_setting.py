"""How much the notebooks do, and the commands that they call for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import setting as module
from setting import ROOT, Setting, chosen_setting


@pytest.mark.parametrize(("given", "name"), [(None, "full"), ("small", "small"), ("full", "full")])
def test_the_setting_is_that_of_the_environment(given: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAT_NOTEBOOKS", raising=False)
    if given:
        monkeypatch.setenv("RAT_NOTEBOOKS", given)
    setting = chosen_setting()
    assert setting.name == name
    assert str(setting).startswith(f"setting: {name}")
    assert ("no results" in str(setting)) == (name == "small")
    assert (setting.results == ROOT / "docs" / "results") == (name == "full")
    assert setting.results == setting.results


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAT_NOTEBOOKS", "tiny")
    with pytest.raises(ValueError, match="RAT_NOTEBOOKS is 'tiny': take one of small, full"):
        chosen_setting()


def test_commands_are_shown_and_what_they_say_without_the_temporary_folder(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting("small")
    setting.cli("--help")
    assert capsys.readouterr().out.startswith("$ python cli.py --help\nusage: python cli.py COMMAND")
    nowhere = setting.results / "nowhere"
    with pytest.raises(RuntimeError, match="ended with 2:\nerror: there is no command 'verify'"):
        setting.cli("verify", nowhere)
    assert capsys.readouterr().out == "$ python cli.py verify $RESULTS/nowhere\n"


HERE = {"processor": "CPU", "threads": 2, "torch": "2"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """The options of every measurement, which takes as many milliseconds as there were; the first is interrupted."""
    calls: list[dict[str, str]] = []

    def measure(self: Setting, *arguments: object, quiet: bool) -> None:
        assert quiet
        assert arguments[:2] == ("bench", "layer")
        given = dict(zip(*[iter(map(str, arguments[2:]))] * 2, strict=True))
        calls.append(given)
        options = {"chunk_size": int(given["--chunk_size"]), "dtype": given["--dtype"], "batch_size": 2}
        options |= {"modes": json.loads(given["--modes"])}
        content = {"complete": len(calls) > 1, "rows": [{"milliseconds": float(len(calls))}], "options": options}
        content |= {"machine": HERE, "rates": {"flops_per_second": 2e9, "bytes_per_second": 3e9}}
        folder = module.ROOT / given["--output"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "layer.json").write_text(json.dumps(content))

    monkeypatch.setattr(Setting, "cli", measure)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "machine_facts", lambda device: HERE)
    return calls


def test_what_is_measured_is_not_measured_again(
    measured: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for size, expected in ((4, 1.0), (4, 2.0), (4, 2.0), (16, 3.0), (16, 3.0)):
        rows = Setting("full").bench("some", chunk_size=size, dtype="float32", modes=["train", "decode"])
        assert rows.to_dict("records") == [
            {"milliseconds": expected, "call": "some", "chunk_size": size, "dtype": "float32", "batch_size": 2}
        ]
        assert capsys.readouterr().out.endswith("CPU, matrix products at 2 GFLOP/s, copies at 3.0 GB/s\n")
    given = {"--dtype": "float32", "--modes": '["train", "decode"]', "--output": "docs/results/some"}
    assert measured == [{"--chunk_size": size, **given} for size in ("4", "4", "16")]


@pytest.mark.parametrize("fact", [{"processor": "another"}, {"threads": 1}, {"torch": "3"}])
def test_measurements_of_another_machine_stay(
    fact: dict[str, Any], measured: list[dict[str, str]], tmp_path: Path
) -> None:
    for _ in range(2):
        Setting("full").bench("some", chunk_size=4, dtype="float32", modes=["train"])
    committed = tmp_path / "docs/results/some/layer.json"
    committed.write_text(there := json.dumps(json.loads(committed.read_text()) | {"machine": HERE | fact}))
    for _ in range(2):
        rows = Setting("full").bench("some", chunk_size=4, dtype="float32", modes=["train"])
        assert rows.milliseconds.tolist() == [3.0]
    assert committed.read_text() == there
    assert [call["--output"] for call in measured] == ["docs/results/some"] * 2 + ["runs/notebooks/some"]


def test_tiny_language_models_read_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the small setting names the folders of its own; the corpus is made once."""
    setting, calls = Setting("small"), []
    monkeypatch.setattr(Setting, "cli", lambda self, *arguments, quiet=False: calls.append(list(arguments)))
    for _ in range(2):
        assert setting.language_sweep("positions", ["rat-swa-nope"]) == setting.results / "positions"
    assert [call[0] for call in calls] == ["prepare", "sweep", "sweep"]
    assert len(list((setting.results / "texts").glob("*.txt"))) == len(list((ROOT / "docs").glob("*.md")))
    words = calls[-1]
    options = json.loads(words[words.index("--options") + 1])
    assert options["data.init_args.path"] == str(setting.corpus) == str(setting.results / "data")
    assert options["model.model.rope_base"] is None
    assert list(json.loads(words[words.index("--variants") + 1])) == ["rat-swa-nope"]
    assert words[words.index("--output") + 1] == setting.results / "positions"
