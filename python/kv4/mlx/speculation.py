"""Dropping the rejected tokens of a draft from kv4's caches.

mlx-lm trims a cache for two reasons through one pair of functions. Its store of prompts may drop any number of tokens:
`is_trimmable` says whether a cache still holds what that needs, which past a sliding window it does not. Speculative
decoding drops the newest few alone, which KV4Cache keeps, but asks the same question and does not look at what
`trim_prompt_cache` returns, so that a no leaves the wrong tokens in. The two names are therefore replaced in
mlx_lm.generate, where speculative decoding alone looks them up. Lists without a kv4 cache are passed on.
"""

from __future__ import annotations

import importlib
from typing import Any

from mlx_lm.models import cache as stock

from kv4.messages import mismatch

from .cache import KV4Cache


def can_trim_prompt_cache(cache: list[Any]) -> bool:
    """Whether the tokens of a draft can be dropped from `cache` once they have been appended."""
    if not _holds_kv4(cache):
        return stock.can_trim_prompt_cache(cache)
    return all(isinstance(c, KV4Cache) or c.is_trimmable() for c in cache)


def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
    """Drops the newest `num_tokens` of every layer, those that are left being final; returns their number.

    Errors: ValueError where a layer no longer holds what would be needed; all layers are then as they were.
    """
    if not _holds_kv4(cache):
        return stock.trim_prompt_cache(cache, num_tokens)
    for index, layer in enumerate(cache):
        if isinstance(layer, KV4Cache):
            most = layer.can_roll_back()
            if num_tokens > most:
                held = f"at most {most} in layer {index}, whose window of {layer.window} tokens has moved on"
                raise ValueError(mismatch("num_tokens", held, num_tokens))
        elif num_tokens > 0 and not layer.is_trimmable():
            kind = f"{type(layer).__name__}, which can drop none now"
            raise ValueError(mismatch(f"cache[{index}]", f"one that can drop {num_tokens} tokens", kind))
    trimmed = [layer.trim(num_tokens) for layer in cache]
    return trimmed[0]


def hook() -> None:
    """Puts both functions where mlx-lm's speculative decoding looks them up."""
    module = importlib.import_module("mlx_lm.generate")
    for own in (can_trim_prompt_cache, trim_prompt_cache):
        if getattr(module, own.__name__, None) is getattr(stock, own.__name__):
            setattr(module, own.__name__, own)


def _holds_kv4(cache: list[Any]) -> bool:
    return any(isinstance(layer, KV4Cache) for layer in cache)
