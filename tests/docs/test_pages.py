"""What the pages name is there: files, links and their headings, commands, targets of make, Python names."""

import re
from itertools import product
from pathlib import Path
from pkgutil import resolve_name

from rat_cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def spelled_out(path: str) -> list[str]:
    """a/{b,c}.yaml -> a/b.yaml, a/c.yaml."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(chosen) for chosen in product(*parts)]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of `page` is called, as GitHub makes it of the heading's words."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(
        r"(?<![\w/])(?:configs|docs|notebooks|tests)/[\w/{},*.-]+\.(?:yaml|sbatch|py|md|ipynb)\b", text
    ):
        for name in spelled_out(path):
            assert list(ROOT.glob(name)), f"{page.name} names {name}"


def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(((?!https?:)[^)#]*)(?:#([^)]*))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_commands_and_targets_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for command in re.findall(r"\bcli\.py (\w+(?: \w+)?)", text):
        assert {command, command.split()[0]} & set(COMMANDS), f"{page.name} names the command {command}"
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name} names make {target}"


def test_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:rat|rat_cli|datamodules|lightning_modules)(?:\.\w+)+)`", page.read_text()):
        resolve_name(name)
