"""Attention of a long call: MLX's own kernels over the call's own exact keys and values, the packed cache for
everything earlier, merged through the softmax's maximum and sum (`kv4/attention.h`)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

_QUERY_BLOCK = 256  # bounds the scores held at once


@dataclass(frozen=True)
class State:
    """A partial state over a set of tokens: o [batch, q_heads, T, d] = sum exp(s - m) v, m = max s and
    l = sum exp(s - m) [batch, q_heads, T], all float32; -infinity and 0 over no tokens."""

    o: mx.array
    m: mx.array
    l: mx.array  # noqa: E741

    def merge(self, other: State) -> State:
        m = mx.maximum(self.m, other.m)
        top = mx.maximum(m, mx.array(-1e30))  # of two empty states
        a, b = mx.exp(self.m - top), mx.exp(other.m - top)
        return State(self.o * a[..., None] + other.o * b[..., None], m, self.l * a + other.l * b)

    def finish(self, sinks: mx.array | None) -> mx.array:
        """o / (l + exp(sink - m)), 0 over no tokens."""
        total = self.l
        scale = None
        if sinks is not None:
            logits = sinks.astype(mx.float32).reshape(1, -1, 1)
            m = mx.maximum(self.m, logits)
            scale = mx.exp(self.m - m)
            total = total * scale + mx.exp(logits - m)
        o = self.o if scale is None else self.o * scale[..., None]
        return mx.where(total[..., None] > 0, o / mx.maximum(total, mx.array(1e-38))[..., None], mx.array(0.0))


def own_mask(tokens: int, window: int, first: int = 0, count: int | None = None) -> mx.array:
    """bool [count, tokens]: what the queries first ... first + count - 1 of a call see of its own tokens."""
    row = mx.arange(first, first + (tokens if count is None else count))[:, None]
    column = mx.arange(tokens)[None]
    keep = column <= row
    return keep & (column > row - window) if window else keep


def own_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, window: int, sinks: mx.array | None) -> mx.array:
    """Causal attention of a call that starts a sequence, by MLX's fused kernel."""
    tokens = q.shape[2]
    mask = own_mask(tokens, window) if window and tokens > window else "causal"
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def own_state(q: mx.array, k: mx.array, v: mx.array, scale: float, window: int) -> State:
    """The partial state of causal attention among the call's own tokens. q [batch, q_heads, T, d]; k, v
    [batch, kv_heads, T, d]; window 0 means none."""
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    grouped = (q.astype(mx.float32) * scale).reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    keys, values = k.astype(mx.float32)[:, :, None], v.astype(mx.float32)[:, :, None]
    parts = []
    for first in range(0, tokens, _QUERY_BLOCK):
        count = min(_QUERY_BLOCK, tokens - first)
        lo = max(0, first - window + 1) if window else 0
        hi = first + count
        scores = grouped[..., first:hi, :] @ keys[..., lo:hi, :].swapaxes(-1, -2)
        scores = mx.where(own_mask(tokens, window, first, count)[:, lo:hi], scores, mx.array(-mx.inf))
        m = scores.max(-1)
        weights = mx.exp(scores - m[..., None])
        part = (weights @ values[..., lo:hi, :], m, weights.sum(-1))
        mx.eval(part)
        parts.append(part)
    o, m, total = (mx.concatenate([part[i] for part in parts], axis=3) for i in range(3))
    return State(
        o.reshape(batch, heads, tokens, -1), m.reshape(batch, heads, tokens), total.reshape(batch, heads, tokens)
    )
