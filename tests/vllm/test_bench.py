"""`kv4 bench vllm`: an engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv4.bench import vllm as bench


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def test_the_command_times_steps_of_a_shape(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = "bench vllm --shape llama-tiny --kinds kv4 --cases 1x100,2x300 --steps 4 --dtype float32 --eager"
    limits = f"--batched-tokens 256 --memory 0.2 --json {file}"
    python = Path(sys.executable).parent / "kv4"
    environment = {**os.environ, "KV4_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([python, *command.split(), *limits.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["kind"], row["batch"], row["tokens"]) for row in rows] == [("kv4", 1, 100), ("kv4", 2, 300)]
    assert all(row["refused"] is None and row["step_seconds"] > 0 and row["prefill_seconds"] > 0 for row in rows)
    assert rows[0]["tokens_that_fit"] == rows[1]["tokens_that_fit"] > 100_000
    # Its lambda, of random weights, was kept under the model's digest.
    assert len(list((tmp_path / "vllm").rglob("*.npy"))) == 2


def test_a_cache_that_does_not_start_is_a_row_with_the_reason(tmp_path: Path) -> None:
    plan = bench.Plan(str(tmp_path / "nowhere"), "kv4", [(1, 64)], 2)
    (row,) = bench.run(plan)
    assert row.kind == "kv4" and row.step_seconds == 0 and "nowhere" in (row.refused or ""), row
