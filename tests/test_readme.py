"""The pages name only files and commands that there are."""

import re
from itertools import product
from pathlib import Path

import pytest

from rat_cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def spelled_out(path: str) -> list[str]:
    """a/{b,c}.yaml -> a/b.yaml, a/c.yaml."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(chosen) for chosen in product(*parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_and_commands_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for path in re.findall(r"configs/[\w/{},*.-]+\.(?:yaml|sbatch)", text):
        for name in spelled_out(path):
            assert list(ROOT.glob(name)), f"{page.name} names {name}"
    for command in re.findall(r"python cli\.py (\w+(?: \w+)?)", text):
        assert {command, command.split()[0]} & set(COMMANDS), f"{page.name} names the command {command}"
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name} names make {target}"
