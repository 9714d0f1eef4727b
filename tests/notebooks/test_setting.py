"""How much the notebooks do, and the commands that they call for it."""

import json
from pathlib import Path

import pytest
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


def test_what_is_measured_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting, calls = Setting("small"), []

    def measure(self: Setting, *arguments: object, quiet: bool) -> None:
        """The command, which is interrupted in its first call."""
        assert quiet
        calls.append([str(argument) for argument in arguments])
        given = dict(zip(calls[-1][2::2], calls[-1][3::2], strict=True))
        options = {"chunk_size": int(given["--chunk_size"]), "dtype": given["--dtype"], "batch_size": 2}
        options |= {"modes": json.loads(given["--modes"])}
        content = {"complete": len(calls) > 1, "rows": [{"milliseconds": float(len(calls))}], "options": options}
        content |= {
            "machine": {"processor": "CPU" if len(calls) > 2 else "another CPU"},
            "rates": {"flops_per_second": 2e9, "bytes_per_second": 3e9},
        }
        folder = Path(calls[-1][-1])
        folder.mkdir(exist_ok=True)
        (folder / "layer.json").write_text(json.dumps(content))

    monkeypatch.setattr(Setting, "cli", measure)
    monkeypatch.setattr("setting.machine_facts", lambda device: {"processor": "CPU"})
    for size, expected in ((4, 1.0), (4, 2.0), (4, 3.0), (4, 3.0), (16, 4.0), (16, 4.0)):
        rows = setting.bench("some", chunk_size=size, dtype="float32", modes=["train", "decode"])
        assert rows.to_dict("records") == [
            {"milliseconds": expected, "call": "some", "chunk_size": size, "dtype": "float32", "batch_size": 2}
        ]
        assert capsys.readouterr().out.endswith("CPU, matrix products at 2 GFLOP/s, copies at 3.0 GB/s\n")
    words = ["--dtype", "float32", "--modes", '["train", "decode"]', "--output", str(setting.results / "some")]
    assert calls == [["bench", "layer", "--chunk_size", size, *words] for size in ("4", "4", "4", "16")]


def test_tiny_language_models_read_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the small setting names the folders of its own; the corpus is made once."""
    setting, calls = Setting("small"), []
    monkeypatch.setattr(Setting, "cli", lambda self, *arguments, quiet=False: calls.append(list(arguments)))
    for _ in range(2):
        assert (
            setting.language_sweep("chunk_size", ["rnn"], {"model.model.rope_base": None})
            == setting.results / "chunk_size"
        )
    assert [call[0] for call in calls] == ["prepare", "sweep", "sweep"]
    assert len(list((setting.results / "texts").glob("*.txt"))) == len(list((ROOT / "docs").glob("*.md")))
    words = calls[-1]
    options = json.loads(words[words.index("--options") + 1])
    assert options["data.init_args.path"] == str(setting.corpus) == str(setting.results / "data")
    assert options["model.model.rope_base"] is None
    assert list(json.loads(words[words.index("--variants") + 1])) == ["rnn"]
    assert words[words.index("--output") + 1] == setting.results / "chunk_size"
