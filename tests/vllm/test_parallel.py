"""Two ranks that share each layer's KV heads answer as one does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of 4 KV heads whose weights are as a trained one's: products of the order of 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=256**-0.5,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def answers(folder: Path, ranks: int, cache: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(HERE / "parallel.py"), str(folder), str(ranks)],
        capture_output=True,
        text=True,
        timeout=420,
        env={
            **os.environ,
            "KV4_CACHE_DIR": str(cache),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM says more behind it.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[{")))


def test_two_ranks_answer_as_one(folder: Path, tmp_path: Path) -> None:
    one, two = (answers(folder, ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    # Lambda of each layer, measured by each rank for its own heads.
    assert len(list((tmp_path / "2").rglob("*of2.npy"))) == 4
    for a, b in zip(one, two, strict=True):
        for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            seen, other = a["logprobs"][i], b["logprobs"][i]
            # Sums over heads in another order, in float32.
            apart = max((abs(seen[t] - other[t]) for t in seen if t in other), default=math.inf)
            assert apart < 1e-2, (i, apart)
            if x != y:
                assert abs(seen[str(x)] - seen[str(y)]) < 1e-2, i
                break
