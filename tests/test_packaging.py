"""pyproject.toml, requirements.lock and environment.yml tell one story."""

import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
LOCK = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
OPTIONAL = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
WANTED = [
    requirement
    for requirement in map(Requirement, PROJECT["dependencies"] + OPTIONAL)
    if requirement.name != PROJECT["name"]
]


def needed_by(name: str, extras: set[str]) -> list[Requirement]:
    needed = [Requirement(text) for text in requires(name) or []]
    return [
        r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    ]


def locked_version(name: str) -> Version:
    (pin,) = LOCK[canonicalize_name(name)].specifier
    assert pin.operator == "==", f"{name} is not pinned in requirements.lock"
    return Version(pin.version)


@pytest.mark.parametrize("requirement", WANTED, ids=lambda requirement: requirement.name)
def test_the_lock_satisfies_what_the_project_asks_for(requirement: Requirement) -> None:
    assert locked_version(requirement.name) in requirement.specifier


@pytest.mark.parametrize("name", sorted(LOCK))
def test_what_is_installed_is_what_is_locked(name: str) -> None:
    assert Version(version(name)).public == locked_version(name).public


@pytest.mark.parametrize("name", sorted(LOCK))
def test_the_lock_is_complete(name: str) -> None:
    missing = [requirement.name for requirement in needed_by(name, extras=set())]
    # The GPU builds of torch bring their CUDA libraries along; the lock leaves their choice to torch.
    missing = [n for n in missing if canonicalize_name(n) not in LOCK and not n.startswith(("nvidia-", "cuda-"))]
    assert set(missing) <= {"setuptools"}, f"{name} needs {missing}, which requirements.lock does not name"


@pytest.mark.parametrize("asked", [r for r in WANTED if r.extras], ids=str)
def test_the_lock_has_the_extras_that_are_asked_for(asked: Requirement) -> None:
    assert {canonicalize_name(r.name) for r in needed_by(asked.name, asked.extras)} <= set(LOCK)


def test_conda_gets_the_lock_and_a_python_that_fits() -> None:
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["--requirement requirements.lock", "--editable ."]}
    name, _, wanted = python.partition("=")
    assert name == "python"
    assert Version(wanted) in SpecifierSet(PROJECT["requires-python"])


def test_an_installed_package_carries_the_sources_of_its_kernels() -> None:
    shipped = {
        path
        for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert {path for kind in ("*.cpp", "*.h") for path in (ROOT / "rat").rglob(kind)} <= shipped
