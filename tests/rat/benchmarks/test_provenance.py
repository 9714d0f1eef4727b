"""Figures know the machine and the code that they were measured with."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rat.benchmarks import provenance

CPU = torch.device("cpu")


def test_code_is_known_by_version_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code() -> dict[str, Any]:
        provenance.code_version.cache_clear()
        return provenance.code_version()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert code() == {"package": "0.1.0", "commit": None, "dirty": None}
    for name in ("rat.py", "docs/table.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "new.py").write_text("")
    (tmp_path / "docs/table.md").write_text("2")
    assert code() == {"package": "0.1.0", "commit": commit, "dirty": False}
    (tmp_path / "rat.py").write_text("2")
    assert code()["dirty"] is True
    provenance.code_version.cache_clear()


def test_the_machine_is_described() -> None:
    facts = provenance.machine_facts(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    line = provenance.machine(CPU)
    assert line == f"{facts['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
