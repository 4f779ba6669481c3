"""Decode steps of vLLM with kv4's cache and with its own ones: the same prompts, one engine at a time.

Each engine runs in a process of its own, `python -m kv4.bench.vllm`, which reads a plan as JSON from its standard input
and prints results on lines that begin with MARK.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARK = "kv4-bench: "
# Tokens that the first requests may have generated when the last prompt gets its first one.
_AHEAD = 1024
# Tokens of the prompts of an engine's warm-up for a case.
_WARM = 1024
# Engine arguments for each kind of cache. vLLM's fp8 wants a bfloat16 model.
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "fp8": {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
    "int4_per_token_head": {"kv_cache_dtype": "int4_per_token_head"},
    "kv4": {"attention_backend": "CUSTOM", "additional_config": {"kv4": {"recipe": "kv4"}}},
    "kv4-exact": {"attention_backend": "CUSTOM", "additional_config": {"kv4": {"recipe": "exact"}}},
}


@dataclass
class Plan:
    """The cases of one engine. folder: of a model; random: its weights are random."""

    folder: str
    kind: str
    cases: list[tuple[int, int]]  # sequences x tokens of each
    steps: int
    random: bool = False
    settings: dict[str, Any] | None = None  # more arguments of LLM


@dataclass
class Row:
    kind: str
    tokens_that_fit: int | None
    start_seconds: float
    batch: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(plan: Plan, progress: Callable[[str], None] = lambda what: None) -> list[Row]:
    """Runs a plan in a process of its own. A kind that does not start is one row with the last line of its error."""
    done = subprocess.Popen(
        [sys.executable, "-m", "kv4.bench.vllm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if not os.environ.get("KV4_BENCH_SHOW") else None,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
    )
    output, errors = done.communicate(json.dumps(asdict(plan)))
    rows = [Row(**json.loads(line.removeprefix(MARK))) for line in output.splitlines() if line.startswith(MARK)]
    for row in rows:
        progress(f"{row.kind}: {row.batch} x {row.tokens}")
    if done.returncode != 0:
        rows.append(Row(plan.kind, None, 0.0, refused=reason(errors or "")))
    return rows


def reason(log: str) -> str:
    """The last error that a process's log names."""
    lines = [line for line in log.splitlines() if "Error" in line] or ["no reason said"]
    return lines[-1].strip()[:300]


def shape_folder(shape: str, root: Path, layers: int | None = None) -> Path:
    """A model folder without weights, for random ones; layers: the number of layers, the shape's own if not given."""
    from kv4.bench.shapes import config_of

    folder = root / shape
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, layers=layers)
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.save_pretrained(folder)
    return folder


def prompts(batch: int, tokens: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Prompts of random tokens, all different."""
    drawn = np.random.default_rng(batch * 1_000_003 + tokens).integers(3, min(vocabulary, 30_000), (batch, tokens))
    return [{"prompt_token_ids": row.tolist()} for row in drawn]


def _rows(plan: Plan) -> Iterator[Row]:
    from vllm import LLM, SamplingParams

    # Requests generate until the last prompt has started and all steps are timed.
    longest = max(tokens for _, tokens in plan.cases) + plan.steps + _AHEAD
    settings: dict[str, Any] = {
        "dtype": "auto",
        "max_model_len": longest,
        "max_num_seqs": max(batch for batch, _ in plan.cases),
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        **({"load_format": "dummy"} if plan.random else {}),
        **KINDS[plan.kind],
        **(plan.settings or {}),
    }
    begun = time.perf_counter()
    llm = LLM(plan.folder, **settings)
    start = time.perf_counter() - begun
    engine = llm.llm_engine
    fit = getattr(engine.vllm_config.cache_config, "kv_cache_size_tokens", None)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    for batch, tokens in plan.cases:
        _steps(engine, SamplingParams, prompts(batch, min(tokens, _WARM), vocabulary), 2)
        prefill, step = _steps(engine, SamplingParams, prompts(batch, tokens, vocabulary), plan.steps)
        yield Row(plan.kind, fit, start, batch, tokens, prefill, step)


def _steps(engine: Any, params: Any, asked: list[dict], steps: int) -> tuple[float, float]:
    """Seconds until every prompt has its first token, and seconds of a step after that, with all of them decoding."""
    greedy = params(max_tokens=steps + _AHEAD, ignore_eos=True, temperature=0, detokenize=False)
    names = [f"{time.monotonic_ns()}-{i}" for i in range(len(asked))]
    begun = time.perf_counter()
    for name, prompt in zip(names, asked, strict=True):
        engine.add_request(name, prompt, greedy)
    counts = dict.fromkeys(names, 0)

    def until(least: int) -> None:
        while min(counts.values()) < least:
            for found in engine.step():
                counts[found.request_id] = len(found.outputs[0].token_ids)

    until(1)
    prefill = time.perf_counter() - begun
    until(3)  # past steps that were scheduled asynchronously
    first, begun = min(counts.values()), time.perf_counter()
    until(first + steps)
    seconds = (time.perf_counter() - begun) / steps
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return prefill, seconds


def main() -> None:
    given = json.load(sys.stdin)
    given["cases"] = [tuple(case) for case in given["cases"]]
    for row in _rows(Plan(**given)):
        print(MARK + json.dumps(row.to_dict()), flush=True)


def measure(
    model: str | None,
    shape: str | None,
    kinds: list[str],
    cases: list[tuple[int, int]],
    steps: int,
    settings: dict[str, Any],
    progress: Callable[[str], None] = lambda what: None,
    layers: int | None = None,
) -> list[Row]:
    """model: a folder; or shape: random weights, with `layers` layers if given."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as root:
        folder = model if shape is None else str(shape_folder(shape, Path(root), layers))
        for kind in kinds:
            rows += run(Plan(str(folder), kind, cases, steps, shape is not None, settings), progress)
    return rows


if __name__ == "__main__":
    main()
