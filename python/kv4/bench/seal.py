"""Sealing: fused rotation, per-channel lambda, scale and int4 packing of key and value vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import log2
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kv4 import _core

# Bergach, arXiv 2605.05699: the fused Metal kernel at d = 128 on an M1's 8-core GPU.
PAPER_NS, PAPER_GFLOPS, PAPER_DIM = 25.0, 182.0, 128
FLOP_FORMULA = "2.5 d log2 d (real FFT) + 5 d (sign, lambda, abs-max, scale, round)"


def flops(dim: int) -> float:
    """Operations per vector, by FLOP_FORMULA."""
    return 2.5 * dim * log2(dim) + 5 * dim


def paper_flops(dim: int) -> float:
    """The paper's own count: 182 GFLOP/s * 25 ns = 4,550 at d = 128, which is 5 d log2 d (a complex
    FFT of d points) within 2 %."""
    return 5 * dim * log2(dim)


@dataclass
class Row:
    what: str
    dim: int
    threads: int
    ns_per_vector: float

    @property
    def gflops(self) -> float:
        return flops(self.dim) / self.ns_per_vector

    @property
    def paper_gflops(self) -> float:
        return paper_flops(self.dim) / self.ns_per_vector

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gflops": self.gflops, "gflops_paper_count": self.paper_gflops}


def kernel(dim: int, *, vectors: int = 8192, repeats: int = 15, rotation: str = "srft") -> Row:
    """The kernel alone, on contiguous rows: abs-max and uniform levels, as in the paper."""
    return Row("kernel", dim, _core.num_threads(), median(_core.bench_seal(dim, rotation, vectors, repeats)))


@torch.inference_mode()
def through_cache(
    what: str,
    recipe: Any,
    dim: int,
    *,
    heads: int = 8,
    tokens: int = 8192,
    repeats: int = 7,
    progress: Callable[[], None] | None = None,
) -> Row:
    """Append and seal of a whole cache, allocation and bookkeeping included: the cost in a prefill.

    A vector is one head's key or value of one token.
    """
    generator = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(2))
    cache = _core.Cache(recipe, dtype="float32", kv_heads=heads, head_dim_k=dim, head_dim_v=dim)
    times = []
    for _ in range(repeats + 1):
        cache.reset()
        begin = perf_counter()
        cache.append(k, v)
        cache.seal()
        times.append(perf_counter() - begin)
        if progress is not None:
            progress()
    sealed = 2 * heads * cache.sealed_tokens(0)
    return Row(what, dim, _core.num_threads(), 1e9 * median(times[1:]) / sealed)
