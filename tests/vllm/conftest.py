"""vLLM in this process, one engine at a time. Run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("KV4_CPU_OPERAND_BITS", "16")  # answers that are alike are so to a few units of 16 bits

import pytest

# Of `kv4 models`; and how many prompts are read at once.
MODEL = os.environ.get("KV4_VLLM_MODEL", "gemma-3-270m")
PROMPTS = int(os.environ.get("KV4_VLLM_PROMPTS", "12"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kv4.models import list_models

    found = next(model for model in list_models() if model.name == MODEL)
    assert found.pulled, f"{MODEL} is not in the cache: kv4 pull {MODEL}"
    # What servers keep is the tests' own.
    os.environ["KV4_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    return found.folder


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[dict[str, list[int]]]:
    """1 to 3,000 tokens of the project's own documents, longer and shorter ones beside each other."""
    from transformers import AutoTokenizer

    root = Path(__file__).resolve().parents[2]
    text = "\n".join(
        (root / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "docs/format.md")
    )
    ids = AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)
    lengths = [1, 3000, 5, 63, 700, 64, 65, 127, 1500, 128, 129, 200]
    lengths += [7 + 37 * i * i % 2900 for i in range(len(lengths), PROMPTS)]
    return [{"prompt_token_ids": [2] + ids[150 * i : 150 * i + n - 1]} for i, n in enumerate(lengths)]


@pytest.fixture
def engine(model: Path) -> Callable[..., Any]:
    @contextmanager
    def start(recipe: str | None, **settings: Any) -> Iterator[Any]:
        """recipe None: vLLM's own backend."""
        from vllm import LLM

        own = (
            {} if recipe is None else {"attention_backend": "CUSTOM", "additional_config": {"kv4": {"recipe": recipe}}}
        )
        defaults = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 4096, "max_num_batched_tokens": 1024}
        llm = LLM(str(model), **{**defaults, **own, **settings})
        try:
            # An engine that goes takes the process groups of the next one with it, so the test must not hold it.
            yield weakref.proxy(llm)
        finally:
            del llm
            gc.collect()

    return start
