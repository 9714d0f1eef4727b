"""The README's picture of the layer is what its script draws."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def words(picture: Path) -> list[str]:
    """What is written in it, in its order."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text(), re.DOTALL)


def test_the_committed_picture_says_what_the_script_writes(tmp_path: Path) -> None:
    script = shutil.copy(DOCS / "draw_layer.py", tmp_path)  # which draws beside itself
    subprocess.run([sys.executable, script], check=True)
    assert words(tmp_path / "layer.svg") == words(DOCS / "layer.svg")
    assert len(words(DOCS / "layer.svg")) > 32, "a word for each token and each state"
