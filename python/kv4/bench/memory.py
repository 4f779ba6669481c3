"""Bytes of a cache, and of fp16 rows of the same tokens."""

from __future__ import annotations

from typing import Any

import torch

from kv4.hf import KV4Cache, KV4Layer
from kv4.hf.kinds import layer_kinds


def cache_bytes(cache: Any) -> int:
    """Every byte of a kv4 cache; the keys and values of any other."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


def kv_shape(text: Any) -> tuple[int, int]:
    """(KV heads, head dim) of a text decoder's config."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def fp16_bytes(config: Any, tokens: int, batch: int = 1) -> int:
    """Bytes of the model's own cache in float16 after `tokens` tokens.

    2 bytes * (key + value channels) * KV heads * tokens, over the layers; a layer with a sliding
    window w holds the newest w - 1 tokens, as transformers' DynamicCache does.
    """
    text = config.get_text_config(decoder=True)
    heads, head_dim = kv_shape(text)
    total = 0
    for kind, arguments in layer_kinds(text):
        if not kind.endswith("_attention") or kind == "linear_attention":
            continue
        window = arguments.get("sliding_window")
        held = tokens if window is None else min(tokens, window - 1)
        total += 2 * 2 * head_dim * heads * held * batch
    return total


MEASURED_TOKENS = 16384


def kv4_bytes(config: Any, recipe: Any, tokens: int, dtype: Any) -> int:
    """Bytes of a KV4Cache with one sequence of `tokens` tokens: measured on a layer of each kind, filled with random
    rows of `dtype`; beyond MEASURED_TOKENS extrapolated from the bytes per token of their second half. Layers of
    transformers' own are not counted."""
    text = config.get_text_config(decoder=True)
    heads, head_dim = kv_shape(text)
    measured: dict[tuple[str, Any], int] = {}
    total = 0
    for layer, (kind, arguments) in zip(KV4Cache(config, recipe).layers, layer_kinds(text), strict=True):
        if not isinstance(layer, KV4Layer):
            continue
        key = kind, arguments.get("sliding_window")
        if key not in measured:
            measured[key] = _layer_bytes(layer, heads, head_dim, tokens, dtype)
        total += measured[key]
    return total


def _layer_bytes(layer: KV4Layer, heads: int, head_dim: int, tokens: int, dtype: Any) -> int:
    filled = min(tokens, MEASURED_TOKENS)
    rows = torch.randn(1, heads, 1024, head_dim).to(dtype)
    counts = []
    for upto in (filled // 2, filled):
        while (left := upto - layer.get_seq_length()) > 0:
            layer.update(rows[:, :, :left], rows[:, :, :left])
        layer.seal()
        counts.append(int(layer.nbytes()))
    return counts[1] + (tokens - filled) * (counts[1] - counts[0]) // max(1, filled - filled // 2)
