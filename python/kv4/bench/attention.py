"""Decode attention alone: one query per query head over a cache of T tokens.

Candidates, in one process and interleaved: kv4 on int4 pages (on all threads and on one), kv4's kernels on
exact rows, and torch's scaled_dot_product_attention on dense tensors; also the memory read bandwidth of this
machine, from a loop that only reads. Each iterates over several layers, so that a layer's keys and values are
read from memory, as in a model, and not from the L1 or L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from kv4 import Recipe, _core
from kv4._core import PAGE_TOKENS
from kv4.bench.timing import interleaved

# Query heads, KV heads, head dim: models of tests/cases.h, then shapes that no model there has, by their numbers.
GEOMETRIES: dict[str, tuple[int, int, int]] = {
    "qwen2.5-1.5b": (12, 2, 128),
    "llama-3-8b": (32, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "gemma-3-270m": (4, 1, 256),
    "qwen3-0.6b": (16, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "16/2/64": (16, 2, 64),
    "10/5/128": (10, 5, 128),
    "8/4/96": (8, 4, 96),
}
# The default cases: many query rows per KV head, few, a large head dim; short and long contexts.
QUICK_GEOMETRIES, QUICK_TOKENS = ("qwen2.5-1.5b", "llama-3-8b", "gemma-3-270m"), (4096, 32768)
ALL_TOKENS = (1024, 4096, 16384, 32768)
WORKING_SET = 64 << 20  # bytes of int4 layers to iterate over, at most MAX_LAYERS of them
MAX_LAYERS = 28
HARDLY = 1.25  # two idle cores take 1.5 to 1.9 times less than one
READ_BYTES = 256 << 20  # read to measure the bandwidth: well beyond any last-level cache
ONE_THREAD = "kv4 int4, 1 thread"
SDPA_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Row:
    geometry: str
    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    layers: int
    candidate: str
    seconds: float  # per layer
    bytes_read: int  # per layer
    read_bandwidth: float  # bytes per second of this machine, measured beside the candidates, all threads

    @property
    def ns_per_token_head(self) -> float:
        """Nanoseconds per token and KV head."""
        return 1e9 * self.seconds / (self.tokens * self.kv_heads)

    @property
    def bytes_per_token_head(self) -> float:
        return self.bytes_read / (self.tokens * self.kv_heads)

    @property
    def gb_per_s(self) -> float:
        return 1e-9 * self.bytes_read / self.seconds

    @property
    def roofline(self) -> float:
        """Share of the time that reading the candidate's bytes takes at the machine's read bandwidth."""
        return self.bytes_read / self.seconds / self.read_bandwidth

    def to_dict(self) -> dict[str, Any]:
        derived = ("ns_per_token_head", "bytes_per_token_head", "gb_per_s", "roofline")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def summary(rows: Sequence[Row]) -> str:
    """One case on one line."""
    times = {row.candidate: row.ns_per_token_head for row in rows}
    sdpa = min(times[f"sdpa {name}"] for name in SDPA_DTYPES)
    return (
        f"{rows[0].geometry}, {rows[0].tokens:,} tokens: int4 {times['kv4 int4']:.1f} ns, "
        f"exact fp16 {times['kv4 exact fp16']:.1f}, SDPA {sdpa:.1f}"
    )


def disturbed(rows: Sequence[Row]) -> list[str]:
    """Cases in which all threads took hardly less time than one: another process used a core."""
    times = {(row.geometry, row.tokens, row.candidate): row.seconds for row in rows}
    return [
        f"{geometry}, {tokens:,} tokens"
        for (geometry, tokens, candidate), seconds in times.items()
        if candidate == ONE_THREAD and seconds <= HARDLY * times[geometry, tokens, "kv4 int4"]
    ]


def page_bytes(head_dim: int) -> int:
    """Bytes of one KV head's page in the default recipe (src/format/page.h):
    codes of K and V, an fp16 scale per token on each side, and the fp16 mean of the keys."""
    return PAGE_TOKENS * head_dim + 2 * PAGE_TOKENS * 2 + head_dim * 2


def _filled(recipe: Any, dtype: str, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    cache = _core.Cache(recipe, dtype=dtype, kv_heads=k.shape[1], head_dim_k=k.shape[3], head_dim_v=v.shape[3])
    cache.append(k, v)
    cache.attend(q, torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype))
    cache.seal()
    return cache


def _kv4_call(caches: Sequence[Any], q: torch.Tensor) -> Callable[[], None]:
    out = torch.empty_like(q)

    def call() -> None:
        for cache in caches:
            cache.attend(q, out)

    return call


def _on_one_thread(call: Callable[[], None]) -> Callable[[], None]:
    def alone() -> None:
        threads = _core.num_threads()
        _core.set_num_threads(1)
        try:
            call()
        finally:
            _core.set_num_threads(threads)

    return alone


def _sdpa_call(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], q: torch.Tensor, grouped: bool
) -> Callable[[], None]:
    kv_heads = layers[0][0].shape[1]
    # One query per head and no mask: the heads of a group can be passed as that many queries of one
    # KV head, so that SDPA does not repeat keys and values.
    q = q.view(1, kv_heads, -1, q.shape[3]) if grouped else q

    def call() -> None:
        for k, v in layers:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=not grouped)

    return call


@torch.inference_mode()
def measure(geometry: str, tokens: int, *, seconds: float = 0.2, repeats: int = 7) -> list[Row]:
    """All candidates at one geometry and length; torch's figure is the faster of its GQA mode and
    the grouped view."""
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}; got {geometry}")
    q_heads, kv_heads, dim = GEOMETRIES[geometry]
    size = kv_heads * page_bytes(dim) * tokens // PAGE_TOKENS
    layers = max(1, min(MAX_LAYERS, -(-WORKING_SET // size)))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, q_heads, 1, dim, generator=generator)
    dense: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in SDPA_DTYPES}
    packed: list[Any] = []
    exact: dict[str, list[Any]] = {"float32": [], "float16": []}
    for _ in range(layers):
        k, v = (torch.randn(1, kv_heads, tokens, dim, generator=generator) for _ in range(2))
        packed.append(_filled(Recipe(), "float16", k.half(), v.half(), q.half()))
        for name, caches in exact.items():
            dtype = getattr(torch, name)
            caches.append(_filled(Recipe.exact(), name, k.to(dtype), v.to(dtype), q.to(dtype)))
        for name, dtype in SDPA_DTYPES.items():
            dense[name].append((k.to(dtype), v.to(dtype)))

    calls = {"kv4 int4": _kv4_call(packed, q.half())}
    read = {"kv4 int4": _int4_bytes(packed[0], kv_heads, dim)}
    if _core.num_threads() > 1:
        calls[ONE_THREAD] = _on_one_thread(calls["kv4 int4"])
        read[ONE_THREAD] = read["kv4 int4"]
    for name, short in (("float32", "fp32"), ("float16", "fp16")):
        calls[f"kv4 exact {short}"] = _kv4_call(exact[name], q.to(getattr(torch, name)))
        read[f"kv4 exact {short}"] = 2 * kv_heads * tokens * dim * (4 if short == "fp32" else 2)
    for name, dtype in SDPA_DTYPES.items():
        for grouped in (False, True):
            calls[f"sdpa {name}{' grouped' if grouped else ''}"] = _sdpa_call(dense[name], q.to(dtype), grouped)
        read[f"sdpa {name}"] = 2 * kv_heads * tokens * dim * dtype.itemsize

    speeds = _core.bench_read(READ_BYTES, repeats)
    times = interleaved(calls, seconds=seconds, repeats=repeats)
    bandwidth = median(speeds + _core.bench_read(READ_BYTES, repeats))
    for name in SDPA_DTYPES:
        times[f"sdpa {name}"] = min(times[f"sdpa {name}"], times.pop(f"sdpa {name} grouped"))
    return [
        Row(geometry, q_heads, kv_heads, dim, tokens, layers, name, times[name] / layers, read[name], bandwidth)
        for name in read
    ]


def _int4_bytes(cache: Any, kv_heads: int, dim: int) -> int:
    """Bytes that one decode step reads: sealed pages, and the exact sinks and window in float16."""
    pages = cache.sealed_tokens(0) // PAGE_TOKENS
    return kv_heads * (pages * page_bytes(dim) + cache.exact_tokens(0) * 2 * dim * 2)
