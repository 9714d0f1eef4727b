"""Options of the tests."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prose", type=Path, help="folder of .txt files for tests/datamodules/test_roundtrip.py")
