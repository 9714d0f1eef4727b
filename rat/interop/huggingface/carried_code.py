"""The code of a model, beside its weights: for machines that have transformers and not this package.

transformers copies the files that a model's file imports by `from .name import ...`, and no folders. So every module
that the model needs becomes a file of its own in one folder, `rat.ops.linear` for example rat_ops_linear.py, and
imports the others by these names. All else in the files is as it is here. Of operations only the versions that need
PyTorch alone come along.
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import rat

_ENTRY = "rat.interop.huggingface.modeling"
_BACKENDS = ("reference", "portable")


def auto_map() -> dict[str, str]:
    """Where transformers finds the classes among the files of `carried_files`."""
    # both in one file, since transformers makes another copy of the code for each file
    return {"AutoConfig": f"{_flat(_ENTRY)}.RATConfig", "AutoModelForCausalLM": f"{_flat(_ENTRY)}.RATForCausalLM"}


def carried_files() -> dict[str, str]:
    """The content of every file that an exported model needs, by name."""
    sources = _sources()
    files = {}
    for name, source in sources.items():
        # PyTorch keeps operations by name for the whole process, in which there can be several copies of this code
        source = source.replace('custom_op("rat::', """custom_op(__name__.replace(".", "_") + "::""")
        # the versions of an operation are found by the names of their modules
        source = source.replace('f"{folder}.{name}"', 'f"{folder}_{name}"')
        files[f"{_flat(name)}.py"] = source
    others = "".join(f"    from .{_flat(name)} import __doc__ as _\n" for name in sorted(sources) if name != _ENTRY)
    files[f"{_flat(_ENTRY)}.py"] += (
        f"\n\nif TYPE_CHECKING:  # transformers copies the files that are named here\n{others}"
    )
    return files


def _sources() -> dict[str, str]:
    """The modules that the model needs, with their imports rewritten, by name."""
    found: dict[str, str] = {}
    waiting = [_ENTRY]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        module = importlib.import_module(name)
        source = Path(str(module.__file__)).read_text()
        if "implementations(__name__" in source:
            waiting += [f"{name}.{backend}" for backend in _BACKENDS]
        found[name], needed = _rewrite(source)
        waiting += needed
    found[_ENTRY] = found[_ENTRY].replace("from typing import ", "from typing import TYPE_CHECKING, ", 1)
    return found


def _rewrite(source: str) -> tuple[str, list[str]]:
    """The source with imports from one folder, and the modules that it imports."""
    lines = source.splitlines(keepends=True)
    needed = []
    for node in reversed(list(ast.walk(ast.parse(source)))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != rat.__name__:
            continue
        modules, values = [], []
        for alias in node.names:
            value = getattr(importlib.import_module(str(node.module)), alias.name)
            name = alias.asname or alias.name
            if isinstance(value, ModuleType):
                needed.append(value.__name__)
                modules.append(f"{_flat(value.__name__)} as {name}")
            else:
                values.append(alias.name if alias.asname is None else f"{alias.name} as {name}")
        statements = [f"from . import {', '.join(modules)}"] if modules else []
        if values:
            needed.append(str(node.module))
            statements.append(f"from .{_flat(str(node.module))} import {', '.join(values)}")
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{statement}\n" for statement in statements]
    return "".join(lines), needed


def _flat(name: str) -> str:
    return name.replace(".", "_")
