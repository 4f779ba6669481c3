"""Launches of the kernels for a MetalCache: tables, buffers and grids as src/metal says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .host import ATTEND_THREADS, DTYPES, ROW_THREADS
from .sequence import PAGE

if TYPE_CHECKING:
    from .cache import MetalCache


def attend(
    cache: MetalCache,
    q: torch.Tensor,
    out: torch.Tensor | None,
    partial: torch.Tensor | None,
    views: list[tuple],
    *,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    causal: bool,
    mask: torch.Tensor | None,
    offset: int,
) -> None:
    """One call over all sequences: kv4_prepare, kv4_attend and kv4_merge. Writes out [batch, q_heads, T, d], or
    partial [batch, q_heads, T, d + 2] float32: o, m, l."""
    host, constants = cache.host, cache.constants
    batch, heads, tokens, dim = q.shape
    general = 0 if mask is None else 1 if mask.dtype is torch.bool else 2
    stride = [0] * 4 if mask is None else [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    if mask is not None:
        stride[3] = mask.stride(3)
    tables: dict[str, Any] = constants.tables.attend(
        q_shape=list(q.shape),
        q_stride=list(q.stride()),
        q_dtype=DTYPES[q.dtype],
        out_dtype=None if out is None else DTYPES[out.dtype],
        out_stride=[0] * 4 if out is None else list(out.stride()),
        sequences=views,
        scale=scale,
        softcap=softcap,
        sinks=sinks is not None,
        causal=causal,
        general=general,
        general_dtype="float32" if general != 2 else DTYPES[mask.dtype],
        general_stride=stride,
        columns=0 if mask is None else mask.shape[3],
        offset=offset,
        cores=host.cores,
    )
    call, sequences = host.tensor(tables["call"]), host.tensor(tables["sequences"])
    factors, pages, levels = (host.tensor(tables[name]) for name in ("factors", "pages", "levels"))
    lambdas = [cache.lambda_k(s) for s in cache.sequences]
    one = next((x for x in lambdas if x is not None), None)
    lambda_k = host.nothing
    if one is not None:
        lambda_k = torch.stack([torch.ones_like(one) if x is None else x for x in lambdas])
    # Values have the layer's own lambda: a row of it for every sequence that the tables give one.
    lambda_v = host.nothing
    if cache.given_v is not None:
        lambda_v = cache.given_v.expand(batch, *cache.given_v.shape).contiguous()
    elif one is not None:
        lambda_v = torch.ones_like(lambda_k)
    floats = {"dtype": torch.float32, "device": host.device}
    prepared = torch.empty(max(tables["prepared_floats"], 4), **floats)
    states = torch.empty(max(tables["state_floats"], 4), **floats)
    rows, kv_heads = tables["rows"], cache.heads
    host.launch(
        "kv4_prepare",
        (q, constants.query, lambda_k, sequences, call, factors, prepared),
        (ROW_THREADS, rows, batch * kv_heads),
        ROW_THREADS,
    )
    slab = cache.slab if cache.slab.numel() else host.nothing
    host.launch(
        f"kv4_attend_d{dim}_r{tables['block_rows']}",
        (
            prepared,
            slab,
            pages,
            cache.rows[0],
            cache.rows[1],
            host.nothing if mask is None else mask,
            levels,
            sequences,
            call,
            factors,
            states,
        ),
        (ATTEND_THREADS * tables["splits"], kv_heads * tables["blocks"], batch),
        ATTEND_THREADS,
    )
    target = out
    if out is None:
        target = torch.empty((batch, heads, tokens, dim + 2), **floats)
    host.launch(
        "kv4_merge",
        (
            states,
            constants.output[1],
            lambda_v,
            host.nothing if sinks is None else sinks.to(host.device, torch.float32).contiguous(),
            sequences,
            call,
            target,
        ),
        (ROW_THREADS, rows, batch * kv_heads),
        ROW_THREADS,
    )
    if partial is not None:
        partial.copy_(target)


def _jobs(cache: MetalCache, pages: list[int], row: int, head: int, masked: bool, given: Any) -> np.ndarray:
    """int64 [pages * kv_heads, 6] (kv4_job): head slices whose rows begin at element row + h * head + p * 64 * d.
    masked: they have flags; given: their lambda, or None."""
    tables = cache.constants.tables
    return np.array(
        [
            [
                row + h * head + p * PAGE * cache.dim,
                p * PAGE if masked else -1,
                page * tables.page_bytes + h * tables.head_bytes,
                h if given is not None else -1,
                0,
                PAGE,
            ]
            for p, page in enumerate(pages)
            for h in range(cache.heads)
        ],
        dtype=np.int64,
    )


def seal(cache: MetalCache, b: int, first: int, skip: bytes, pages: list[int]) -> None:
    """Seals window rows [first, first + 64 * len(pages)) of sequence b. skip: a byte per row, nonzero = masked."""
    host, constants = cache.host, cache.constants
    lambda_k = cache.lambda_k(cache.sequences[b])
    head = cache.rows.shape[3] * cache.dim
    row = b * cache.heads * head + (cache.sink_limit + first) * cache.dim
    masked = host.tensor(np.frombuffer(skip, np.uint8).copy())
    for values, given in ((False, lambda_k), (True, cache.given_v)):
        jobs = _jobs(cache, pages, row, head, True, given)
        arguments = (
            cache.rows[int(values)],
            masked,
            host.nothing if given is None else given,
            constants.sealing[values],
            cache.slab,
            host.tensor(jobs),
            constants.side[values],
            constants.levels[values],
        )
        host.launch("kv4_seal", arguments, (ROW_THREADS * len(jobs), 1, 1), ROW_THREADS)


def dequantise(cache: MetalCache, b: int, pages: list[int], values: bool) -> torch.Tensor:
    """float32 [kv_heads, 64 * len(pages), d] of one side of whole pages, in the model's own basis."""
    host, constants = cache.host, cache.constants
    given = cache.given_v if values else cache.lambda_k(cache.sequences[b])
    out = torch.empty((cache.heads, PAGE * len(pages), cache.dim), dtype=torch.float32, device=host.device)
    jobs = _jobs(cache, pages, 0, PAGE * len(pages) * cache.dim, False, given)
    arguments = (
        cache.slab,
        host.nothing if given is None else given,
        constants.output[values],
        host.tensor(jobs),
        constants.side[values],
        constants.levels[values],
        out,
    )
    host.launch("kv4_dequantise", arguments, (ROW_THREADS * len(jobs), PAGE, 1), ROW_THREADS)
    return out
