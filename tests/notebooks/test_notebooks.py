"""The committed notebooks hold what a whole run has shown."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from setting import Setting

from rat_cli import figures

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 500_000
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|mnt|Users)/")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    """All that a cell says, pictures left out."""
    said = []
    for output in cell.outputs:
        data = output.get("data", {"text": output.get("text", "")})
        said += [text for kind, text in data.items() if not kind.startswith("image/png")]
    return said


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["chunk_size", "efficiency", "layer", "lengths", "memory"]


@each
def test_a_committed_notebook_holds_a_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run by make notebooks"
    assert cells[0].outputs[0].text == "setting: full\n"
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    streams = [[output.output_type == "stream" for output in cell.outputs] for cell in cells]
    assert not [cell for cell in streams if (True, True) in pairwise(cell)], "lines one by one"
    assert not [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    for text in (text for cell in cells for text in texts(cell)):
        assert not OF_A_MACHINE.search(text), text
    assert path.stat().st_size < MOST_BYTES


@each
def test_a_committed_notebook_shows_the_tables_of_the_records(path: Path) -> None:
    said = "".join(text for cell in code_cells(nbformat.read(path, 4)) for text in texts(cell))
    swept = re.findall(r"sweep --config configs/ablation/(\w+)\.yaml", said)
    assert bool(swept) == (path.stem in ("chunk_size", "lengths", "memory"))
    tables = [(ROOT / "docs/results" / sweep / "table.md").read_text() for sweep in swept]
    assert [table for table in tables if table not in said] == []


def test_the_speeds_of_efficiency_are_those_of_the_records() -> None:
    cells = code_cells(nbformat.read(ROOT / "notebooks" / "efficiency.ipynb", 4))
    (table,) = (
        output.data["text/html"] for cell in cells for output in cell.outputs if "text/html" in output.get("data", {})
    )
    paths = (ROOT / "docs/results/efficiency").glob("*/layer.json")
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"] if row["contender"] != "attention"]
    assert sorted(re.findall(r"\d+\.\d\dx", table)) == sorted(f"{row['speedup']:.2f}x" for row in rows)


@each
def test_a_notebook_asks_shows_and_says_what_is_seen(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    title, *_ = notebook.cells[0].source.split("\n")
    assert title.startswith("# ")
    assert title.endswith("?")
    shown = [kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in shown
    assert "text/markdown" in code_cells(notebook)[-1].outputs[0].data, "a sentence, made of the numbers"


@each
def test_a_notebook_uses_what_is_there(path: Path) -> None:
    """A name that was changed is found here in no time, not by minutes of execution."""
    owners = {"figures": vars(figures), "setting": {*dir(Setting), "name"}}
    tree = ast.parse("\n".join(cell.source for cell in code_cells(nbformat.read(path, 4))))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {(node.value.id, node.attr) for node in names if node.value.id in owners}
    assert used
    assert [(name, attribute) for name, attribute in used if attribute not in owners[name]] == []


@each
def test_its_commands_are_those_of_the_pages(path: Path) -> None:
    """Which the tests run, see tests/docs."""
    pages = " ".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    told = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", told, re.MULTILINE | re.DOTALL))
    commands = [" ".join(line.partition("#")[0].split()) for line in blocks.splitlines()]
    assert [command for command in commands if command not in " ".join(pages.split())] == []
