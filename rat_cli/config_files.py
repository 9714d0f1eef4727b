"""YAML files on the command line: files that build on others, and errors that name the key, the file and the fix."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

BASE = "base"


class ConfigError(TypeError):
    """A file that cannot be used; the message names it."""


class ConfigParser(ArgumentParser):
    """A parser whose errors are one message instead of a page of usage."""

    # Of the class, since parts of a file are read by parsers that jsonargparse makes from this one.
    reading: ClassVar[Path | None] = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, in which file, and stop with status 2."""
        if self.reading and not isinstance(ex, ConfigError):
            message = f"{self.reading}: {message}"
        if message.startswith("unrecognized arguments: "):
            message += self._did_you_mean(message.split()[2])
        print(f"error: {message}\nsee {self.prog.replace(' [options]', '')} --help", file=sys.stderr)
        sys.exit(2)

    def _did_you_mean(self, option: str) -> str:
        options = [name for action in self._actions for name in action.option_strings]
        return suggestion(option.partition("=")[0], options)


class ConfigFile(ActionConfigFile):
    """`--config FILE`: later files win over earlier ones, and a file over those that it names as its `base`."""

    def __call__(self, parser: ConfigParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        """Read a file: first the ones it builds on, then its own keys, all of them checked."""
        for path in lineage(Path(values)):
            check_keys(parser, cfg, path)
            try:
                ConfigParser.reading = path
                self.apply_config(parser, cfg, self.dest, str(path))
            finally:
                ConfigParser.reading = None
            cfg.pop(BASE, None)


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent does. Raises yaml.YAMLError that tells the line of a second one."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def lineage(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files that `path` builds on, furthest first, then itself.

    Raises:
        ConfigError: a file is missing or in a circle, or is no YAML mapping.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path} builds on itself")
    given = read(path).get(BASE, [])
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: {BASE} must be a file or a list of files, not {given!r:.40}")
    for base in bases:
        if not (path.parent / base).is_file():
            raise ConfigError(f"{path}: its {BASE} {path.parent / base} does not exist")
        yield from lineage(path.parent / base, (*above, path.resolve()))
    yield path


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file. Raises ConfigError as `lineage` does."""
    try:
        content = yaml.load(path.read_text(), _OnceLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a YAML file is needed") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{path} must hold keys and values, not {content!r:.40}")
    return content or {}


def check_keys(parser: ArgumentParser, previous: Namespace, path: Path) -> None:
    """Raise ConfigError for the first key of `path` that nothing accepts.

    Args:
        parser: knows the keys.
        previous: what earlier files have set; tells the class where a file only gives init_args.
        path: the file to check.
    """
    leaves = {action.dest for action in parser._actions if not action.dest.endswith("help")}
    branches = {leaf[:i] for leaf in leaves for i, letter in enumerate(leaf) if letter == "."}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = prefix + str(key).removesuffix("+")
            if name in branches:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{path}: {name} must hold keys and values, not {value!r:.40}")
                walk(value, name + ".")
            elif name in leaves:
                before = previous.get(name)
                _check_classes(value, name, before if isinstance(before, Mapping | Namespace) else {}, path)
            else:
                known = {other[len(prefix) :].split(".")[0] for other in leaves if other.startswith(prefix)}
                _refuse(path, prefix, str(key), {other for other in known if not other.startswith("print_")})

    walk({key: value for key, value in read(path).items() if key != BASE}, "")


def _check_classes(value: Any, name: str, before: Mapping[str, Any] | Namespace, path: Path) -> None:
    """Check `{class_path, init_args}` wherever they stand in the value of `name`."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_classes(item, f"{name}[{i}]", {}, path)
    if not isinstance(value, Mapping) or not ({"class_path", "init_args"} & set(value) or "class_path" in before):
        return
    for key in set(value) - {"class_path", "init_args", "dict_kwargs"}:
        _refuse(path, name + ".", str(key), {"class_path", "init_args", "dict_kwargs"})
    class_path = value.get("class_path") or before.get("class_path")
    known = _names_of(class_path, name, path) if isinstance(class_path, str) else None
    for key, item in (value.get("init_args") or {}).items():
        if known is not None and key not in known:
            _refuse(path, f"{name}.init_args.", str(key), known, f" of {class_path}")
        _check_classes(item, f"{name}.init_args.{key}", {}, path)


def _names_of(class_path: str, name: str, path: Path) -> set[str] | None:
    """What the class accepts; None where only jsonargparse can tell."""
    module, _, short = class_path.rpartition(".")
    if not module:
        return None
    try:
        return accepted_names(getattr(importlib.import_module(module), short))
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: {name}.class_path: there is no module {module}") from None
    except AttributeError:
        names = {other for other, found in vars(sys.modules[module]).items() if isinstance(found, type)}
        hint = suggestion(short, names)
        raise ConfigError(f"{path}: {name}.class_path: {module} has no class {short}{hint}") from None


@cache
def accepted_names(kind: type) -> set[str] | None:
    """The names of the arguments of `kind`, those it passes on to its parents included; None if unknown."""
    try:
        return set(ArgumentParser().add_class_arguments(kind, fail_untyped=False))
    except Exception:  # whatever keeps a signature from being read, jsonargparse meets it again and explains
        return None


def _refuse(path: Path, prefix: str, key: str, known: set[str], owner: str = "") -> NoReturn:
    raise ConfigError(f"{path}: unknown key {prefix}{key}{owner}{suggestion(key, known)}")


def suggestion(name: str, known: set[str] | list[str]) -> str:
    """What `name` was probably meant to be, as the end of a message; else what there is, if that is little."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f"; choose one of {', '.join(sorted(known))}" if 0 < len(known) <= 40 else ""
