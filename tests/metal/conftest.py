"""Shared by the Metal tests. Without clang 19 they are skipped, with a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator import compiler

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiler() is None:
        missing = pytest.mark.skip(reason="needs clang++-19 or later (Debian: clang-19 libclang-rt-19-dev)")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(missing)
