"""Tables of Markdown, which a terminal shows as well, and their place in a page of the docs."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def header(*columns: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield line(*columns)
    yield "|" + "---|" * len(columns)


def line(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write_block(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put `lines` between the markers of this name in a Markdown page; at its end, with markers, if it has none.

    Raises:
        FileNotFoundError: there is no such page.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text()
    block = "\n".join([begin, "", *lines, "", end])
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if re.search(pattern, text, re.DOTALL):
        text = re.sub(pattern, lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    page.write_text(text)
