"""Tables, and their place in a page."""

from pathlib import Path

from rat.markdown import header, line, write_block


def test_a_table_is_a_header_and_lines() -> None:
    assert [*header("a", "b"), line(1, "x")] == ["| a | b |", "|---|---|", "| 1 | x |"]


def test_a_block_takes_the_place_of_its_forerunner(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n")
    write_block(page, "x", ["1"])
    write_block(page, "y", [r"\1 2"])
    write_block(page, "x", ["3"])
    assert page.read_text() == (
        "a\n\n<!-- begin x -->\n\n3\n\n<!-- end x -->\n\n<!-- begin y -->\n\n\\1 2\n\n<!-- end y -->\n"
    )
