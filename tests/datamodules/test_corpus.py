from pathlib import Path

import pytest

from datamodules.corpus import Module, docstring_documents, docstrings, find_modules, package_versions
from datamodules.text_sources import SourceError, Split

SOURCE = '''
"""Of the module.

    Indented.
"""
import nothing_of_this_name_exists

def first():
    """  Of a function."""
    def inner(): "Of an inner one."

class Second:
    """Of a class."""
    try:
        async def method(self):
            r"""Of a method: \\d."""
    except Exception:
        def other(self):
            """Lone \\ud800 surrogate."""

def without():
    x = """Not a docstring."""
'''


def write(folder: Path, sources: dict[str, str]) -> list[Module]:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return [Module(name, folder / f"{name}.py") for name in sources]


def test_every_docstring_is_found_in_order_and_cleaned(tmp_path: Path) -> None:
    (module,) = write(tmp_path, {"a": SOURCE})
    assert docstrings(module.path) == [
        "Of the module.\n\nIndented.",
        "Of a function.",
        "Of an inner one.",
        "Of a class.",
        r"Of a method: \d.",
        "Lone ? surrogate.",
    ]


@pytest.mark.parametrize("source", ["def broken(:", "x = 1", '"""   """', "\0"])
def test_sources_without_docstrings_give_none(tmp_path: Path, source: str) -> None:
    assert docstrings(write(tmp_path, {"a": source})[0].path) == []


def test_a_docstring_is_kept_once(tmp_path: Path) -> None:
    modules = write(tmp_path, {"a": '"One."', "b": '"Two."\ndef f(): "One."\ndef g(): "Two."', "c": '"One."'})
    for num_workers in (1, 2):
        texts = [document.text for document in docstring_documents(modules, Split(0.5, 0), num_workers)]
        assert texts == ["One.", "Two."]


def test_real_packages_divide_into_two_parts_that_share_nothing() -> None:
    modules = find_modules(("networkx",))
    assert modules == sorted(modules)
    assert any(module.name == "networkx.classes.graph" for module in modules)
    documents = docstring_documents(modules, Split(0.1, 0), num_workers=2)
    held_out = sum(document.held_out for document in documents)
    assert 0.03 < held_out / len(documents) < 0.2
    every = [text for module in modules for text in docstrings(module.path)]
    once = set(every)
    assert len(every) > len(once) > len(documents) > 250
    # every docstring stands in the documents once: they are as long as all of them, joined by two newlines
    assert sum(len(document.text) + 2 for document in documents) == sum(len(text) + 2 for text in once)


def test_the_standard_library_has_no_site_packages() -> None:
    names = {module.name for module in find_modules(("python",))}
    assert "python.json.decoder" in names
    assert not any("site-packages" in name for name in names)


def test_versions_name_the_corpus_and_missing_packages() -> None:
    assert set(package_versions(("python", "numpy"))) == {"python", "numpy"}
    with pytest.raises(SourceError, match="no_such_package is not installed: pip install"):
        package_versions(("no_such_package",))
    with pytest.raises(SourceError, match="no_such_package is not an installed package"):
        find_modules(("no_such_package",))
