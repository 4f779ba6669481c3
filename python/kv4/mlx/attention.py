"""Attention over kv4's caches: replaces mlx-lm's scaled_dot_product_attention in an attached model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from kv4._core import PAGE_TOKENS
from kv4.messages import mismatch

from .arrays import DTYPES
from .cache import BatchKV4Cache, KV4Cache
from .handle import KVHandle
from .prefill import own_attention, own_state

dense_attention = base.scaled_dot_product_attention


def scaled_dot_product_attention(
    queries: mx.array,
    keys: KVHandle | mx.array,
    values: KVHandle | mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name, to which anything but a kv4 cache's handles is passed on.

    queries [batch, q_heads, T, head_dim], the newest T tokens; q_heads a multiple of kv_heads. mask: None, "causal",
    bool (True = visible) or a number added to the scores, broadcastable to [batch, q_heads, T, columns], the columns
    being the newest. sinks: [q_heads] logits that join the softmax's denominator only.

    Returns [batch, q_heads, T, head_dim_v] in the queries' dtype. Errors: RuntimeError for a stale handle; ValueError
    naming the argument for shapes that do not fit, or NaN or infinity that a query would see.
    """
    if type(keys) is not KVHandle or type(values) is not KVHandle:
        return dense_attention(queries, keys, values, cache, scale, mask, sinks)
    keys.check()
    values.check()
    if values.cache is not keys.cache:
        raise ValueError(mismatch("values", "the handle of the same cache as keys'", "another cache's"))
    attend = attend_batch if isinstance(keys.cache, BatchKV4Cache) else attend_packed
    return attend(keys.cache, queries, keys.own, values.own, scale, mask, sinks)


def attend_packed(
    cache: KV4Cache,
    queries: mx.array,
    own_k: mx.array | None,
    own_v: mx.array | None,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """See scaled_dot_product_attention; own_k, own_v: the call's own exact keys and values, where it is long."""
    if queries.ndim != 4:
        raise ValueError(mismatch("queries", "[batch, q_heads, tokens, head_dim]", queries))
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(mismatch("mask", '"causal", an array or None', repr(mask)))
    batch, heads, tokens, _ = queries.shape
    if not tokens:
        return mx.zeros((batch, heads, 0, cache.shape_of("values")[3]), queries.dtype)
    if _is_long(cache, queries, own_k, own_v, mask):
        return _attend_long(cache, queries, own_k, own_v, scale, sinks).astype(queries.dtype)
    options: dict[str, Any] = {"scale": scale}
    if sinks is not None:
        options["sinks"] = sinks.astype(mx.float32).reshape(-1)
    if isinstance(mask, mx.array):
        options |= _general(cache, mask)
    elif mask is None and tokens > 1:
        options["causal"] = False
    return cache.core.attend(queries, **options)


def _general(cache: KV4Cache, mask: mx.array) -> dict[str, Any]:
    """Core arguments of a mask [..., T or 1, columns]."""
    if mask.ndim > 4 or mask.ndim < 1:
        raise ValueError(mismatch("mask", "1 to 4 axes [batch, q_heads, tokens, columns]", mask))
    columns = mask.shape[-1]
    if columns > cache.offset:
        raise ValueError(mismatch("mask", f"at most {cache.offset} columns, the tokens in the cache", columns))
    full = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if full.dtype != mx.bool_:
        if full.dtype not in DTYPES:
            raise ValueError(mismatch("mask", "bool, float32, float16 or bfloat16", full.dtype))
        full = full.astype(mx.float32)
    return {"causal": False, "offset": cache.offset - columns, "mask": full}


def _is_long(cache: KV4Cache, q: mx.array, k: mx.array | None, v: mx.array | None, mask: Any) -> bool:
    """True where MLX's own kernels may answer for the call's own tokens."""
    return (
        k is not None
        and v is not None
        and cache.core.mlx_prefills
        and isinstance(mask, str)
        and cache.recipe.seal != "arrival"
        and k.shape[-1] == v.shape[-1] == q.shape[-1]
        and q.dtype == k.dtype
        and q.shape[2] == k.shape[2]
        and q.shape[0] == k.shape[0]
        and q.shape[1] % k.shape[1] == 0
    )


def _attend_long(
    cache: KV4Cache, q: mx.array, k: mx.array, v: mx.array, scale: float, sinks: mx.array | None
) -> mx.array:
    before = cache.offset - q.shape[2]
    if before == 0:
        if cache.recipe.seal == "page":
            cache.core.partial(q, 0, scale)  # records the queries, from which lambda is learned
        return own_attention(q, k, v, scale, cache.window, sinks)
    own = own_state(q, k, v, scale, cache.window)
    return own.merge(cache.core.partial(q, before, scale)).finish(sinks)


def attend_batch(
    cache: BatchKV4Cache,
    queries: mx.array,
    own_k: mx.array | None,
    own_v: mx.array | None,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """As attend_packed; the mask is the rows' own."""
    if isinstance(mask, mx.array):
        raise ValueError(mismatch("mask", 'None or "causal" (padding is the cache\'s own matter)', "an array"))
    if queries.ndim != 4 or queries.shape[0] != len(cache.rows) or queries.shape[2] != cache.tokens:
        expected = f"[{len(cache.rows)}, q_heads, {cache.tokens}, head_dim], those of the newest update"
        raise ValueError(mismatch("queries", expected, queries))
    heads, tokens, dim = queries.shape[1], queries.shape[2], cache.shape_of("values")[3]
    most = max(hi - lo for lo, hi in cache.spans)
    if not most:
        return mx.zeros((len(cache.rows), heads, tokens, dim), queries.dtype)
    if most <= PAGE_TOKENS or not cache.core.mlx_prefills or cache.rows[0].recipe.seal == "arrival":
        options: dict[str, Any] = {} if sinks is None else {"sinks": sinks.astype(mx.float32).reshape(-1)}
        return cache.core.attend(queries, spans=cache.spans, scale=scale, **options)
    outputs = []
    for i, (row, (lo, hi)) in enumerate(zip(cache.rows, cache.spans, strict=True)):
        parts = [mx.zeros((1, heads, n, dim), queries.dtype) for n in (lo, tokens - hi)]
        if hi > lo:
            long = own_k is not None and own_v is not None and hi - lo > PAGE_TOKENS
            own = [x[i : i + 1, :, lo:hi] if long else None for x in (own_k, own_v)]
            parts.insert(1, attend_packed(row, queries[i : i + 1, :, lo:hi], *own, scale, "causal", sinks))
        outputs.append(mx.concatenate(parts, axis=2))
    return mx.concatenate(outputs, axis=0)
