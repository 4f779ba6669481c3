"""Decode attention alone on a CUDA device: one query per query head over a batch of T tokens each.

Candidates, in one process and interleaved: kv4 on int4 pages, torch's scaled_dot_product_attention on fp16 tensors (its
flash and its cuDNN kernels), FlashInfer on fp16 pages where it is installed; also the device's copy bandwidth. Device
time is measured with events, with the L2 cache overwritten before every call, which also gives the host time to enqueue
all kernels of a call; host time of a call by the clock, over consecutive calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kv4 import Recipe
from kv4._core import PAGE_TOKENS
from kv4.bench.attention import GEOMETRIES, page_bytes
from kv4.hf.device import current_stream, new_core, why_no_device

COPY_BYTES = 1 << 30
CALLS = 5  # of one candidate in one repeat
HOST_CALLS = 50
INT4, FLASH, CUDNN, FLASHINFER = "kv4 int4", "sdpa flash fp16", "sdpa cudnn fp16", "flashinfer fp16"
FLASHINFER_PAGE = 16


@dataclass
class Row:
    geometry: str
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    candidate: str
    seconds: float  # on the device, launches of a call included
    host_seconds: float  # to enqueue a call
    bytes_read: int
    copy_bandwidth: float  # bytes read and written per second, measured beside the candidates

    @property
    def gb_per_s(self) -> float:
        return 1e-9 * self.bytes_read / self.seconds

    @property
    def of_copy(self) -> float:
        """Bytes per second, as a share of the copy's."""
        return self.bytes_read / self.seconds / self.copy_bandwidth

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gb_per_s": self.gb_per_s, "of_copy": self.of_copy}


@dataclass
class Candidate:
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around its calls


def interleaved(
    candidates: Mapping[str, Candidate], device: torch.device, *, repeats: int = 7
) -> dict[str, tuple[float, float]]:
    """Medians per call: (seconds on the device, host seconds to enqueue it). Every repeat runs every candidate."""
    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    on_device: dict[str, list[float]] = {name: [] for name in candidates}
    on_host: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):  # the first warms up
        for name, candidate in candidates.items():
            call = candidate.call
            with candidate.context():
                events = []
                for _ in range(CALLS):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    flushed.zero_()
                    begin.record()
                    call()
                    end.record()
                    events.append((begin, end))
                torch.cuda.synchronize(device)
                start = perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                queued = (perf_counter() - start) / HOST_CALLS
                torch.cuda.synchronize(device)
            if repeat:
                on_device[name] += [1e-3 * begin.elapsed_time(end) for begin, end in events]
                on_host[name].append(queued)
    return {name: (median(on_device[name]), median(on_host[name])) for name in candidates}


def copy_bandwidth(device: torch.device, repeats: int = 15) -> float:
    """Bytes read and written per second by a copy of COPY_BYTES."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end))
    return 2 * COPY_BYTES / median(times[2:])


@torch.inference_mode()
def measure(geometry: str, batch: int, tokens: int, device: torch.device, *, repeats: int = 7) -> list[Row]:
    """All candidates that run here at one geometry, batch and length. Errors: ValueError for an unknown geometry,
    RuntimeError with the reason where kv4 has no kernels for the device."""
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}; got {geometry}")
    reason = why_no_device(device)
    if reason is not None or device.type != "cuda":
        raise RuntimeError(f"device: expected a CUDA device that kv4 runs on; got {device}{reason or ''}")
    q_heads, kv_heads, dim = GEOMETRIES[geometry]
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, count: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, dim, generator=generator, device=device, dtype=torch.float16)

    q, k, v = normal(q_heads, 1), normal(kv_heads, tokens), normal(kv_heads, tokens)
    cache = new_core(device, Recipe(), dtype="float16", kv_heads=kv_heads, head_dim_k=dim, head_dim_v=dim)
    cache.set_stream(current_stream(device))
    out = torch.empty_like(q)
    cache.append(k, v)
    cache.attend(q, out)
    cache.seal()

    candidates = {INT4: Candidate(lambda: cache.attend(q, out)), **_sdpa(q, k, v), **_flashinfer(q, k, v)}
    pages = cache.sealed_tokens(0) // PAGE_TOKENS
    dense = 2 * batch * kv_heads * dim * 2
    packed = batch * kv_heads * pages * page_bytes(dim) + cache.exact_tokens(0) * dense
    speed = copy_bandwidth(device)
    times = interleaved(candidates, device, repeats=repeats)
    return [
        Row(
            geometry, q_heads, kv_heads, dim, batch, tokens, name, *times[name],
            packed if name == INT4 else tokens * dense, speed,
        )
        for name in candidates
    ]  # fmt: skip


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Candidate]:
    def call() -> object:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    found = {}
    for name, backend in ((FLASH, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION)):
        context = partial(sdpa_kernel, backend)
        try:
            with context():
                call()
        except RuntimeError:  # this torch has no such kernel for these shapes
            continue
        found[name] = Candidate(call, context)
    return found


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Candidate]:
    try:
        import flashinfer
    except ImportError:
        return {}
    batch, kv_heads, tokens, dim = k.shape
    if tokens % FLASHINFER_PAGE:
        return {}
    per_row = tokens // FLASHINFER_PAGE
    pages = torch.stack([x.transpose(1, 2).reshape(-1, FLASHINFER_PAGE, kv_heads, dim) for x in (k, v)], 1)
    counts = {"dtype": torch.int32, "device": q.device}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=q.device), "NHD", use_tensor_cores=q.shape[1] > kv_heads
    )
    wrapper.plan(
        torch.arange(batch + 1, **counts) * per_row,
        torch.arange(batch * per_row, **counts),
        torch.full((batch,), FLASHINFER_PAGE, **counts),
        q.shape[1],
        kv_heads,
        dim,
        FLASHINFER_PAGE,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    rows = q[:, :, 0].contiguous()
    return {FLASHINFER: Candidate(lambda: wrapper.run(rows, pages))}


def quotients(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of each candidate over kv4's, for the rows of one case."""
    own = next(row.seconds for row in rows if row.candidate == INT4)
    return {row.candidate: row.seconds / own for row in rows}
