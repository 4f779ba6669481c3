"""Attention over kv4's caches: what stands in for mlx-lm's scaled_dot_product_attention in an attached model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from kv4.messages import mismatch

from .handle import KVHandle

_dense_attention = base.scaled_dot_product_attention


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
        return _dense_attention(queries, keys, values, cache, scale, mask, sinks)
    keys.check()
    values.check()
    if values.cache is not keys.cache:
        raise ValueError(mismatch("values", "the handle of the same cache as keys'", "another cache's"))
    return keys.cache.attend(queries, keys.own, values.own, scale, mask, sinks)
