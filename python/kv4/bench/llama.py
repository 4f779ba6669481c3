"""llama.cpp's attention through llama-cpp-python, as the slope of time per token over context.

Only attention grows with the context in a decode step, so the slope is its cost per cached token. One model per
cache type is loaded in this process; they are interleaved at every context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

TYPES = ("f16", "q8_0", "q4_0")  # of both keys and values
BATCH = 512  # tokens of one prefill call


@dataclass
class LlamaRow:
    model: str
    cache_type: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    contexts: list[int]
    ms_per_token: list[float]  # medians, one per context

    @property
    def ns_per_token_head(self) -> float:
        """Nanoseconds per cached token and KV head of one layer: the least-squares slope over the contexts."""
        n = len(self.contexts)
        x, y = sum(self.contexts) / n, sum(self.ms_per_token) / n
        above = sum((a - x) * (b - y) for a, b in zip(self.contexts, self.ms_per_token, strict=True))
        below = sum((a - x) ** 2 for a in self.contexts)
        return 1e6 * above / below / (self.layers * self.kv_heads)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ns_per_token_head": self.ns_per_token_head}


def require() -> Any:
    """The module llama_cpp."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError(
            "--llama: expected llama-cpp-python, which `pip install 'kv4[llama]'` builds; got none"
        ) from error
    return llama_cpp


def load(gguf: Path, kind: str, context: int, threads: int, **options: Any) -> Any:
    """A llama_cpp.Llama for `context` tokens with keys and values of `kind` (q8_0, ...). Errors: see require."""
    llama_cpp = require()
    code = getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")
    return llama_cpp.Llama(
        model_path=str(gguf), n_ctx=context, n_batch=BATCH, n_threads=threads, n_threads_batch=threads,
        type_k=code, type_v=code, flash_attn=True, verbose=False, **options,
    )  # fmt: skip


def check_contexts(contexts: Sequence[int]) -> None:
    """A slope needs two contexts. Errors: ValueError."""
    if len(contexts) < 2:
        raise ValueError(f"--llama-contexts: expected two numbers or more; got {len(contexts)}")


def measure(
    gguf: Path,
    contexts: Sequence[int] = (512, 2048, 4096),
    *,
    steps: int = 8,
    repeats: int = 5,
    threads: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> list[LlamaRow]:
    """Milliseconds per decoded token at each context, for every cache type. A repeat is `steps` tokens of each
    type. Errors: ValueError without llama-cpp-python or with fewer than two contexts."""
    contexts = sorted(set(contexts))
    check_contexts(contexts)
    require()
    models = {}
    for kind in TYPES:
        report(f"llama.cpp {kind}: loading")
        models[kind] = load(gguf, kind, contexts[-1] + steps * (repeats + 1) * len(contexts), threads)
    times: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for context in contexts:
        for kind, model in models.items():
            report(f"llama.cpp {kind}: {context:,} tokens")
            while model.n_tokens < context:
                count = min(BATCH, context - model.n_tokens)
                model.eval([(7 * (model.n_tokens + i)) % 1000 + 100 for i in range(count)])
        taken: dict[str, list[float]] = {kind: [] for kind in TYPES}
        for repeat in range(repeats + 1):
            for kind, model in models.items():
                report(f"llama.cpp {kind}: {context:,} tokens")
                begin = perf_counter()
                for _ in range(steps):
                    model.eval([100])
                if repeat > 0:  # the first warms up
                    taken[kind].append(1e3 * (perf_counter() - begin) / steps)
        for kind in TYPES:
            times[kind].append(median(taken[kind]))
    # The middle of the steps that were timed.
    depths = [context + steps * (repeats + 1) // 2 for context in contexts]
    shape = _shape(models[TYPES[0]].metadata)
    return [LlamaRow(gguf.stem, kind, *shape, depths, times[kind]) for kind in TYPES]


def _shape(metadata: dict[str, str]) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and head dim, from GGUF metadata."""
    name = metadata["general.architecture"]
    layers, heads = int(metadata[f"{name}.block_count"]), int(metadata[f"{name}.attention.head_count"])
    kv_heads = int(metadata.get(f"{name}.attention.head_count_kv", heads))
    dim = metadata.get(f"{name}.attention.key_length")
    return layers, heads, kv_heads, int(dim) if dim else int(metadata[f"{name}.embedding_length"]) // heads
