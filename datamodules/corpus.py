"""A corpus that every installation has: the docstrings of Python's standard library and some packages.

The source files are parsed, never imported, and nothing of them is passed on: everybody makes their own copy
from what they have installed.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import platform
import signal
import sysconfig
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from datamodules.text_sources import Document, SourceError, Split

STANDARD_LIBRARY = "python"
PACKAGES = (STANDARD_LIBRARY, "torch", "numpy", "sympy", "networkx", "pandas")


class Module(NamedTuple):
    """A source file, under a name that is the same on every machine."""

    name: str
    path: Path


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The versions of `packages`, which decide the corpus. Raises SourceError if one is not installed."""
    versions = {}
    for package in packages:
        try:
            is_python = package == STANDARD_LIBRARY
            versions[package] = platform.python_version() if is_python else importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise SourceError(f"{package} is not installed: pip install {package}") from error
    return versions


def find_modules(packages: tuple[str, ...] = PACKAGES) -> list[Module]:
    """Every Python source file of `packages`, sorted by name."""
    modules = []
    for package in packages:
        root = _root(package)
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if package != STANDARD_LIBRARY or not {"site-packages", "dist-packages"} & set(parts):
                modules.append(Module(".".join((package, *parts)), path))
    return sorted(modules)


class DocstringSource:
    """The docstrings of the packages installed here: one unit, since they are deduplicated against each other.

    Args:
        split: what to hold out, by the names of the modules.
        num_processes: that parse.
    """

    def __init__(self, split: Split, num_processes: int) -> None:
        self._split, self._num_processes = split, num_processes
        self._read: list[Document] = []
        self.version = package_versions()
        self.sizes = [0]

    def documents(self, unit: int) -> Iterator[Document]:
        """See `TextSource.documents`."""
        self._read = self._read or docstring_documents(find_modules(), self._split, self._num_processes)
        return iter(self._read)


def docstring_documents(modules: list[Module], split: Split, num_workers: int = 2) -> list[Document]:
    """A document per module: its docstrings, in order, joined by blank lines.

    A docstring that occurs again anywhere is kept only once, so that no held-out one is ever trained on.

    Args:
        modules: what to read.
        split: the modules to hold out, by their names.
        num_workers: processes that parse.
    """
    seen: set[str] = set()
    documents = []
    for module, docstrings in zip(modules, _read_all(modules, num_workers), strict=True):
        new = [text for text in dict.fromkeys(docstrings) if text not in seen]
        seen.update(new)
        if new:
            documents.append(Document("\n\n".join(new), split.holds_out(module.name)))
    return documents


def docstrings(path: Path) -> list[str]:
    """The docstrings of the module at `path` and all in it, cleaned of indentation; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = (ast.get_docstring(node, clean=False) for node in _documented(tree))
    # some docstrings hold lone surrogates, which are no text
    cleaned = (inspect.cleandoc(text).encode(errors="replace").decode() for text in found if text)
    return [text for text in cleaned if text.strip()]


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes that may have a docstring, in the order of the source; expressions, most of a tree, are not entered."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, block, ())
        if isinstance(children, list):
            for child in children:
                yield from _documented(child)


def _read_all(modules: list[Module], num_workers: int) -> Iterator[list[str]]:
    paths = [module.path for module in modules]
    show = partial(tqdm, total=len(paths), desc="reading docstrings", unit="file")
    if num_workers < 2:
        yield from show(map(docstrings, paths))
        return
    # spawned, because a fork would inherit the threads of the tokenizer or of torch
    with multiprocessing.get_context("spawn").Pool(num_workers, initializer=_start_worker) as pool:
        yield from show(pool.imap(docstrings, paths, chunksize=32))


def _start_worker() -> None:
    # parsing makes many objects and no cycles: looking for garbage would be a fifth of the time
    gc.disable()
    # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{package} is not an installed package: pip install {package}")
    return Path(spec.submodule_search_locations[0])
