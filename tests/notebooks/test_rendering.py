"""`make notebooks` runs at the small setting, and what it makes and what is committed is seen in a browser."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[2]
PICTURES = runpy.run_path(str(ROOT / "docs/draw_tensorboard.py"))
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
# the pictures that a reader sees, and those of them that are broken
SEEN = "return [...document.images].filter((x) => x.complete).map((x) => x.naturalWidth * x.clientWidth > 0)"

pytestmark = pytest.mark.slow
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `make notebooks` makes of them at the small setting."""
    runs = tmp_path_factory.mktemp("runs")
    before = {file: file.stat().st_mtime_ns for folder in ("docs", "notebooks") for file in (ROOT / folder).rglob("*")}
    given = [f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed", f"RUNS={runs}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", f"--directory={ROOT}", "notebooks", *given],
        env=environment | {"RAT_NOTEBOOKS": "small"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = {file: file.stat().st_mtime_ns for folder in ("docs", "notebooks") for file in (ROOT / folder).rglob("*")}
    assert {**after} == {**before} | {file: at for file, at in after.items() if "__pycache__" in file.parts}
    return runs / "notebooks"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if PICTURES["missing"]():
        pytest.skip(PICTURES["missing"]())
    with PICTURES["Page"]("about:blank") as page:
        yield page


@each
def test_it_says_what_it_sees_at_the_small_setting(name: str, executed: Path) -> None:
    cells = [cell for cell in nbformat.read(executed / name, 4).cells if cell.cell_type == "code"]
    assert "setting: small" in cells[0].outputs[0].text
    assert "text/markdown" in cells[-1].outputs[0].data


@each
@pytest.mark.parametrize("which", ["small", "committed"])
def test_it_is_seen_in_a_browser(name: str, which: str, request: Any, browser: Any, tmp_path: Path) -> None:
    path = request.getfixturevalue("executed") / name if which == "small" else ROOT / "notebooks" / name
    page, _ = HTMLExporter(embed_images=True).from_filename(str(path))
    (tmp_path / "page.html").write_text(page)
    browser.driver.get(f"file://{tmp_path / 'page.html'}")
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    browser.wait(lambda: browser.driver.execute_script(SEEN) == [True] * len(pictures))
    said = "".join(outputs[-1].data["text/markdown"])
    words = [word for word in said.split() if word.isalpha()]
    shown = browser.driver.find_element("css selector", ".jp-Cell:last-child .jp-RenderedMarkdown").text.split()
    assert len(words) > 10
    assert set(words) <= set(shown)
