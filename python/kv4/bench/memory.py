"""Bytes that a cache holds, and what fp16 rows of the same tokens would take."""

from __future__ import annotations

from typing import Any

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
    """Bytes of the model's own cache in float16 once it has seen `tokens` tokens.

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
