"""Launches of the kernels for a Cache: tables, buffers and grids as src/metal says."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv4 import _core
from kv4._core import PAGE_TOKENS as PAGE

from .host import ATTEND_THREADS, ROW_THREADS
from .sequence import Holding

# Tokens [first, first + count) of a page: (page, first, count, skip, input, row, lambda row), the rows being those from
# `row` on of an array [inputs, kv_heads, rows, d]; skip: index of the first one's flag. It and the last: -1 for none.
Job = tuple[int, int, int, int, int, int, int]


def attend(
    cache: Holding,
    q: Any,
    sequences: list[tuple[_core.Ledger, _core.Sight, int, int, int]],
    *,
    lambda_k: Any,
    out: Any,
    dtype: str | None,
    scale: float,
    softcap: float,
    sinks: Any,
    causal: bool,
    mask: Any,
    offset: int,
) -> Any:
    """One call over all sequences, as MetalTables.attend has them: kv4_prepare, kv4_attend and kv4_merge. Returns out
    [inputs, q_heads, T, d], or one made in `dtype`; or with None for both partial states [inputs, q_heads, T, d + 2]
    float32: o, m, l. Rows that no sequence has are not written. lambda_k: [rows, kv_heads, d] or None. Errors:
    IndexError where a sequence's position cuts into its sealed tokens."""
    host, constants = cache.host, cache.constants
    inputs, heads, tokens, dim = q.shape
    general, general_dtype, stride = 0, "float32", [0] * 4
    if mask is not None:
        boolean = host.dtype(mask) == "bool"
        general, general_dtype = (1, "float32") if boolean else (2, host.dtype(mask))
        own = host.strides(mask)
        stride = [*(0 if n == 1 else s for n, s in zip(mask.shape[:3], own[:3], strict=True)), own[3]]
    out_dtype = dtype if out is None else host.dtype(out)
    out_shape = (inputs, heads, tokens, dim if out_dtype else dim + 2)
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
        sequences=sequences,
        rows=cache.rows[0].shape[2],
        lambda_v=cache.given_v is not None,
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
    factors, ids, levels = (host.table(tables[name]) for name in ("factors", "ids", "levels"))
    (prepared,) = host.run(
        "kv4_prepare",
        (q, constants.query, host.nothing if lambda_k is None else lambda_k, rows, call, factors),
        [((max(tables["prepared_floats"], 4),), "float32")],
        tables["row_grid"],
        ROW_THREADS,
    )
    (states,) = host.run(
        tables["kernel"],
        (
            prepared,
            cache.pool.slab if cache.pool.slab.shape[0] else host.nothing,
            ids,
            *(x if x.shape[2] else host.nothing for x in cache.rows),
            host.nothing if mask is None else mask,
            levels,
            rows,
            call,
            factors,
        ),
        [((max(tables["state_floats"], 4),), "float32")],
        tables["attend_grid"],
        ATTEND_THREADS,
    )
    (done,) = host.run(
        "kv4_merge",
        (
            states,
            constants.output[1],
            host.nothing if cache.given_v is None else cache.given_v,
            host.nothing if sinks is None else host.cast(sinks, "float32"),
            rows,
            call,
        ),
        [(out_shape, out_dtype or "float32") if out is None else out],
        tables["row_grid"],
        ROW_THREADS,
    )
    return done


def seal(cache: Holding, rows: list[Any], jobs: list[Job], skip: bytes, lambda_k: Any) -> None:
    """Seals rows of keys and values, arrays [inputs, kv_heads, rows, d], into pages of the pool, each named once. skip:
    a byte per row, nonzero = masked. lambda_k: [rows, kv_heads, d] or None."""
    host, constants, heads = cache.host, cache.constants, cache.heads
    masked = host.table(np.frombuffer(skip, np.uint8).copy())
    own = jobs if host.in_place else [(i, *job[1:]) for i, job in enumerate(jobs)]
    fresh = []
    for values, given in ((False, lambda_k), (True, cache.given_v)):
        if values:
            own = [(*job[:6], -1 if given is None else 0) for job in own]
        x, size = rows[values], constants.side_bytes[values]
        table = constants.tables.jobs(own, stride=host.strides(x), dtype=host.dtype(x))
        inputs = (
            x,
            masked,
            host.nothing if given is None else given,
            constants.sealing[values],
            host.table(table),
            (constants.side if host.in_place else constants.side_alone)[values],
            constants.levels[values],
        )
        output = cache.pool.slab if host.in_place else ((len(jobs), heads, size), "uint8")
        fresh += host.run("kv4_seal", inputs, [output], (ROW_THREADS * len(jobs), heads, 1), ROW_THREADS)
    if host.in_place:
        return
    pages = [job[0] for job in jobs]
    whole = host.concatenate(fresh, 2).reshape(len(pages), cache.pool.page_bytes)
    if any(job[2] < PAGE for job in jobs):  # the page's other tokens keep their codes
        first, count = (np.array([job[i] for job in jobs])[:, None] for i in (1, 2))
        written = (constants.token_of_byte >= first) & (constants.token_of_byte < first + count)
        whole = host.where(np.tile(written, heads), whole, host.take(cache.pool.slab, pages, 0))
    cache.pool.slab = host.put(cache.pool.slab, pages, whole)


def dequantise(cache: Holding, given: Any, pages: list[int], values: bool) -> Any:
    """float32 [kv_heads, 64 * len(pages), d] of one side of whole pages, in the model's own basis. given: their
    lambda, or None."""
    host, constants = cache.host, cache.constants
    rows = PAGE * len(pages)
    jobs = [(page, 0, PAGE, -1, 0, i * PAGE, -1 if given is None else 0) for i, page in enumerate(pages)]
    stride = [0, rows * cache.dim, cache.dim, 1]
    inputs = (
        cache.pool.slab,
        host.nothing if given is None else given,
        constants.output[values],
        host.table(constants.tables.jobs(jobs, stride=stride, dtype="float32")),
        constants.side[values],
        constants.levels[values],
    )
    (out,) = host.run(
        "kv4_dequantise",
        inputs,
        [((cache.heads, rows, cache.dim), "float32")],
        (ROW_THREADS * len(pages), PAGE, cache.heads),
        ROW_THREADS,
    )
    return out
