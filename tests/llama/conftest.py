"""llama.cpp as it was built beside the tree, with and without kv4's backend."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny import TINY, write

import kv4.models

BUILT = Path(__file__).resolve().parents[2] / "build/llama/hosts/llama.cpp"
BACKEND = BUILT / "libggml-kv4.so"
CPU: dict[str, str] = {}  # llama.cpp's own cache
EXACT = {"GGML_BACKEND_PATH": str(BACKEND), "KV4_RECIPE": "exact"}
PACKED = {"GGML_BACKEND_PATH": str(BACKEND), "KV4_VERBOSE": "1"}

Probe = Callable[..., tuple[dict[str, str], str]]
Model = Callable[[str], Path]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KV4_", "GGML_", "LLAMA_"))}
    return {**kept, "OMP_WAIT_POLICY": "passive", "KV4_CPU_OPERAND_BITS": "16", **more}


def run(
    command: list[str | Path], more: Mapping[str, str] = CPU, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command], env=environment(more), capture_output=True, text=True, errors="replace"
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def read(command: list[str | Path], more: Mapping[str, str], pattern: str) -> tuple[re.Match[str], str]:
    """What a program logs: the match of `pattern`, and all of it. A thread writes llama.cpp's log, and programs do
    not always wait for as they end: one that ended well without its last lines is run again."""
    output = ""
    for _ in range(4):
        done = run(command, more)
        output = done.stdout + done.stderr
        if found := re.search(pattern, output):
            return found, output
    raise AssertionError(output[-3000:])


def said(text: str) -> list[str]:
    """kv4's own lines, but for those that KV4_VERBOSE asks for."""
    lines = re.findall(r"kv4: (.*)", text)
    return [line for line in lines if not line.startswith(("cleared: ", "at the end: "))]


def held(text: str, when: str) -> tuple[float, float, float]:
    """MiB that the larger of a model's caches held: exact, packed, and its address space."""
    lines = re.findall(rf"kv4: {when}: .*exact ([\d.]+) MiB, packed ([\d.]+) MiB\) of ([\d.]+) MiB", text)
    assert lines, text
    exact, packed, space = max(tuple(map(float, line)) for line in lines)
    return exact, packed, space


@pytest.fixture(scope="session")
def programs() -> Path:
    folder = Path(os.environ["KV4_LLAMA"]) / "build/bin"
    assert (folder / "llama-server").exists() and BACKEND.exists(), "expected what make test-llama builds"
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model's file, by its name in tiny.TINY or in kv4.models."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in TINY:
            return kv4.models.pull_gguf(name)
        if name not in made:
            made[name] = write(TINY[name], folder / f"{name}.gguf")
        return made[name]

    return find


@pytest.fixture(scope="session")
def text(programs: Path) -> Path:
    """Prose that is there anyway."""
    return programs.parents[1] / "source/README.md"


@pytest.fixture(scope="session")
def probe(programs: Path, model: Model) -> Probe:
    """What tests/llama/probe.cpp says, by name, and what was said beside it."""
    seen: dict[tuple[object, ...], tuple[dict[str, str], str]] = {}

    def ask(
        more: Mapping[str, str], name: str, *arguments: str | Path, options: str = "", tokens: int = 24
    ) -> tuple[dict[str, str], str]:
        key = (tuple(sorted(more.items())), name, options, tokens, *arguments)
        if key not in seen:
            command = [BUILT / "kv4_llama_probe", programs, model(name), options, str(tokens), *arguments]
            done = run(command, more)
            seen[key] = (dict(line.split(":", 1) for line in done.stdout.splitlines()), done.stderr)
        return seen[key]

    return ask
