"""llama.cpp as it was built beside the tree, with and without kv4's backend."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import kv4.models

BUILT = Path(__file__).resolve().parents[2] / "build/llama/hosts/llama.cpp"
BACKEND = BUILT / "libggml-kv4.so"
CPU: dict[str, str] = {}  # llama.cpp's own cache
EXACT = {"GGML_BACKEND_PATH": str(BACKEND), "KV4_RECIPE": "exact"}
PACKED = {"GGML_BACKEND_PATH": str(BACKEND), "KV4_VERBOSE": "1"}


def environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KV4_", "GGML_", "LLAMA_"))}
    return {**kept, "OMP_WAIT_POLICY": "passive", **more}


def run(
    command: list[str | Path], more: Mapping[str, str] = CPU, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command], env=environment(more), capture_output=True, text=True, errors="replace"
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def programs() -> Path:
    folder = Path(os.environ["KV4_LLAMA"]) / "build/bin"
    assert (folder / "llama-server").exists() and BACKEND.exists(), "expected what make test-llama builds"
    return folder


@pytest.fixture(scope="session")
def model() -> Callable[[str], Path]:
    return lambda name: kv4.models.pull_gguf(name)


@pytest.fixture(scope="session")
def text(programs: Path) -> Path:
    """Prose that is there anyway."""
    return programs.parents[1] / "source/README.md"


@pytest.fixture(scope="session")
def probe(programs: Path, text: Path, model: Callable[[str], Path]) -> Callable[..., tuple[dict[str, str], str]]:
    """What tests/llama/probe.cpp says, by name, and what was said beside it."""
    seen: dict[tuple[object, ...], tuple[dict[str, str], str]] = {}

    def ask(
        more: Mapping[str, str], name: str = "gemma-3-270m", size: int = 2000, unified: bool = False, tokens: int = 24
    ) -> tuple[dict[str, str], str]:
        key = (tuple(sorted(more.items())), name, size, unified, tokens)
        if key not in seen:
            done = run(
                [BUILT / "kv4_llama_probe", programs, model(name), text, str(size), str(int(unified)), str(tokens)],
                more,
            )
            seen[key] = (dict(line.split(":", 1) for line in done.stdout.splitlines()), done.stderr)
        return seen[key]

    return ask
