"""Launches of the kernels for a Cache: tables, buffers and grids as src/metal says."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv4._core import PAGE_TOKENS as PAGE

from .host import ATTEND_THREADS, ROW_THREADS
from .sequence import Holding, Sequence


def attend(
    cache: Holding,
    sequences: list[Sequence],
    q: Any,
    views: list[tuple],
    *,
    out: Any,
    dtype: str | None,
    scale: float,
    softcap: float,
    sinks: Any,
    causal: bool,
    mask: Any,
    offset: int,
) -> Any:
    """One call over all sequences: kv4_prepare, kv4_attend and kv4_merge. Returns out [batch, q_heads, T, d], or one
    made in `dtype`; or with None for both partial states [batch, q_heads, T, d + 2] float32: o, m, l."""
    host, constants = cache.host, cache.constants
    batch, heads, tokens, dim = q.shape
    general, general_dtype, stride = 0, "float32", [0] * 4
    if mask is not None:
        boolean = host.dtype(mask) == "bool"
        general, general_dtype = (1, "float32") if boolean else (2, host.dtype(mask))
        own = host.strides(mask)
        stride = [*(0 if n == 1 else s for n, s in zip(mask.shape[:3], own[:3], strict=True)), own[3]]
    out_dtype = dtype if out is None else host.dtype(out)
    out_shape = (batch, heads, tokens, dim if out_dtype else dim + 2)
    if out is not None:
        out_stride = host.strides(out)
    else:
        out_stride = [heads * tokens * out_shape[3], tokens * out_shape[3], out_shape[3], 1]
    tables: dict[str, Any] = constants.tables.attend(
        q_shape=list(q.shape),
        q_stride=host.strides(q),
        q_dtype=host.dtype(q),
        out_dtype=out_dtype,
        out_stride=out_stride,
        sequences=views,
        scale=scale,
        softcap=softcap,
        sinks=sinks is not None,
        causal=causal,
        general=general,
        general_dtype=general_dtype,
        general_stride=stride,
        columns=0 if mask is None else mask.shape[3],
        offset=offset,
        cores=host.cores,
    )
    call, rows = host.table(tables["call"]), host.table(tables["sequences"])
    factors, pages, levels = (host.table(tables[name]) for name in ("factors", "pages", "levels"))
    lambdas = [cache.lambda_k(s) for s in sequences]
    lambda_k = lambda_v = host.nothing
    if cache.given_v is not None or any(x is not None for x in lambdas):
        one = host.table(np.ones((cache.heads, dim), np.float32))
        lambda_k = host.stack([one if x is None else x for x in lambdas])
        lambda_v = host.stack([one] * batch)
    # Values have the layer's own lambda: a row of it for every sequence that the tables give one.
    if cache.given_v is not None:
        lambda_v = host.stack([cache.given_v] * batch)
    (prepared,) = host.run(
        "kv4_prepare",
        (q, constants.query, lambda_k, rows, call, factors),
        [((max(tables["prepared_floats"], 4),), "float32")],
        (ROW_THREADS * (heads // cache.heads), tokens, batch * cache.heads),
        ROW_THREADS,
    )
    (states,) = host.run(
        f"kv4_attend_d{dim}_r{tables['block_rows']}",
        (
            prepared,
            cache.pool.slab if cache.pool.slab.shape[0] else host.nothing,
            pages,
            *cache.rows,
            host.nothing if mask is None else mask,
            levels,
            rows,
            call,
            factors,
        ),
        [((max(tables["state_floats"], 4),), "float32")],
        (ATTEND_THREADS * tables["splits"], cache.heads * tables["blocks"], batch),
        ATTEND_THREADS,
    )
    (done,) = host.run(
        "kv4_merge",
        (
            states,
            constants.output[1],
            lambda_v,
            host.nothing if sinks is None else host.cast(sinks, "float32"),
            rows,
            call,
        ),
        [(out_shape, out_dtype or "float32") if out is None else out],
        (ROW_THREADS * (heads // cache.heads), tokens, batch * cache.heads),
        ROW_THREADS,
    )
    return done


def _jobs(cache: Holding, slices: list[tuple[int, int]], row: int, head: int, masked: bool, given: Any) -> np.ndarray:
    """int64 [len(slices), 6] (kv4_job) of whole pages. slices: (byte in the pages, head) of each, page by page; their
    rows begin at element row + h * head + p * 64 * d. masked: rows have flags; given: their lambda, or None."""
    heads = cache.heads
    return np.array(
        [
            [
                row + h * head + i // heads * PAGE * cache.dim,
                i // heads * PAGE if masked else -1,
                at,
                h if given is not None else -1,
                0,
                PAGE,
            ]
            for i, (at, h) in enumerate(slices)
        ],
        dtype=np.int64,
    )


def _slices(pages: list[int], heads: int, page_bytes: int, head_bytes: int) -> list[tuple[int, int]]:
    return [(page * page_bytes + h * head_bytes, h) for page in pages for h in range(heads)]


def seal(cache: Holding, b: int, lambda_k: Any, first: int, skip: bytes, pages: list[int]) -> None:
    """Seals window rows [first, first + 64 * len(pages)) of sequence b. skip: a byte per row, nonzero = masked."""
    host, constants, heads = cache.host, cache.constants, cache.heads
    head = cache.rows[0].shape[2] * cache.dim
    row = b * heads * head + (cache.sink_limit + first) * cache.dim
    masked = host.table(np.frombuffer(skip, np.uint8).copy())
    fresh = []
    for values, given in ((False, lambda_k), (True, cache.given_v)):
        size = constants.value_bytes if values else constants.key_bytes
        if host.in_place:
            slices = _slices(pages, heads, cache.pool.page_bytes, constants.tables.head_bytes)
            output, side = cache.pool.slab, constants.side
        else:
            slices = _slices(list(range(len(pages))), heads, heads * size, size)
            output, side = ((len(pages), heads, size), "uint8"), constants.side_alone
        inputs = (
            cache.rows[int(values)],
            masked,
            host.nothing if given is None else given,
            constants.sealing[values],
            host.table(_jobs(cache, slices, row, head, True, given)),
            side[values],
            constants.levels[values],
        )
        fresh += host.run("kv4_seal", inputs, [output], (ROW_THREADS * len(slices), 1, 1), ROW_THREADS)
    if not host.in_place:
        whole = host.concatenate(fresh, 2).reshape(len(pages), cache.pool.page_bytes)
        cache.pool.slab = host.put(cache.pool.slab, pages, whole)


def dequantise(cache: Holding, given: Any, pages: list[int], values: bool) -> Any:
    """float32 [kv_heads, 64 * len(pages), d] of one side of whole pages, in the model's own basis. given: their
    lambda, or None."""
    host, constants = cache.host, cache.constants
    slices = _slices(pages, cache.heads, cache.pool.page_bytes, constants.tables.head_bytes)
    inputs = (
        cache.pool.slab,
        host.nothing if given is None else given,
        constants.output[values],
        host.table(_jobs(cache, slices, 0, PAGE * len(pages) * cache.dim, False, given)),
        constants.side[values],
        constants.levels[values],
    )
    (out,) = host.run(
        "kv4_dequantise",
        inputs,
        [((cache.heads, PAGE * len(pages), cache.dim), "float32")],
        (ROW_THREADS * len(slices), PAGE, 1),
        ROW_THREADS,
    )
    return out
