"""`kv4 bench vllm`: an engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv4.bench import vllm as bench
from kv4.bench import vllm_serve as serve


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def rows_of(command: str, folder: Path) -> tuple[list[dict], str]:
    """Rows of `kv4 bench vllm` with a small random model and kv4's cache, and what it prints."""
    file = folder / "rows.json"
    common = f"--shape llama-tiny --kinds kv4 --dtype float32 --eager --batched-tokens 256 --memory 0.2 --json {file}"
    python = Path(sys.executable).parent / "kv4"
    environment = {**os.environ, "KV4_CACHE_DIR": str(folder)}
    given = [python, "bench", "vllm", *command.split(), *common.split()]
    done = subprocess.run(given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"], done.stdout


def test_the_command_times_steps_of_a_shape(tmp_path: Path) -> None:
    rows, _ = rows_of("--cases 1x100,2x300 --steps 4", tmp_path)
    assert [(row["kind"], row["batch"], row["tokens"]) for row in rows] == [("kv4", 1, 100), ("kv4", 2, 300)]
    assert all(row["refused"] is None and row["step_seconds"] > 0 and row["prefill_seconds"] > 0 for row in rows)
    assert rows[0]["tokens_that_fit"] == rows[1]["tokens_that_fit"] > 100_000
    # Its lambda, of random weights, was kept under the model's digest.
    assert len(list((tmp_path / "vllm").rglob("*.npy"))) == 2


def test_a_cache_that_does_not_start_is_a_row_with_the_reason(tmp_path: Path) -> None:
    plan = bench.Plan(str(tmp_path / "nowhere"), "kv4", [(1, 64)], 2)
    (row,) = bench.run(plan)
    assert row.kind == "kv4" and row.step_seconds == 0 and "nowhere" in (row.refused or ""), row


def test_the_command_serves_chats(tmp_path: Path) -> None:
    (row,), printed = rows_of("--requests 6 --longest 200", tmp_path)
    assert "6 chats at once" in printed
    assert row["refused"] is None, row
    assert (row["kind"], row["completed"], row["failed"]) == ("kv4", 6, 0)
    assert row["tokens_a_second"] > row["requests_a_second"] > 0 and row["first_token_ms"] > 0 and row["token_ms"] > 0


def test_chats_are_uneven_and_the_same_every_time() -> None:
    load = serve.Load(400)
    drawn = serve.lengths(load)
    assert drawn == serve.lengths(load) != serve.lengths(serve.Load(400, seed=1))
    prompts, answers = sorted(p for p, _ in drawn), sorted(a for _, a in drawn)
    assert prompts[0] >= 10 and prompts[-1] <= 8192 and 200 < prompts[200] < 450 and prompts[380] > 4 * prompts[200]
    assert answers[0] >= 8 and answers[-1] <= 1024 and 100 < answers[200] < 220


def test_settings_become_options() -> None:
    given = {"enforce_eager": True, "max_model_len": 64, "dtype": None, "x": False, "additional_config": {"a": [1]}}
    assert serve.flags(given) == ["--enforce-eager", "--max-model-len", "64", "--additional-config", '{"a": [1]}']


def test_a_server_that_does_not_start_is_a_row_with_the_reason(tmp_path: Path) -> None:
    (row,) = serve.measure(str(tmp_path / "nowhere"), None, ["kv4"], serve.Load(2), {})
    assert row.completed == 0 and "nowhere" in (row.refused or ""), row
