"""kv4.mlx against mlx-lm's own caches: bytes, greedy tokens, and KL divergence along a text.

A text is processed in calls of one page, so that every cache attends to its stored tokens: a longer call would attend
to its own tokens exactly. KL is sum p (log p - log q) in nats with p under mlx-lm's own cache, over the second half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as stock

import kv4.mlx
from kv4._core import PAGE_TOKENS as CALL
from kv4.bench.text import python_reference
from kv4.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One cache: `nbytes` after the text with float16 keys and values, as mlx-lm and kv4 count them; kl and top1 over
    the scored tokens; same: greedy tokens equal to the own cache's before the first difference. Where a cache is
    not supported the figures are None, and `refused` says why."""

    cache: str
    nbytes: int | None
    kl: float | None
    top1: float | None
    same: int | None
    generated: int
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a HuggingFace folder, in float32, float16 or bfloat16."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model, tokenizer


def caches(bits: int = 4) -> dict[str, Callable[[Any], list[Any]]]:
    """The function that creates each candidate's cache for a model. mlx-lm's --kv-bits quantises with groups of 64."""
    return {
        "mlx-lm's own": stock.make_prompt_cache,
        "kv4, exact": lambda model: kv4.mlx.make_prompt_cache(model, Recipe.exact()),
        "kv4": kv4.mlx.make_prompt_cache,
        f"mlx-lm, {bits} bits": lambda model: [c.to_quantized(64, bits) for c in stock.make_prompt_cache(model)],
    }


def log_probabilities(model: Any, ids: mx.array, cache: list[Any], first: int) -> np.ndarray:
    """float32 [T - first, vocabulary] after tokens first ... T - 1."""
    parts = []
    for at in range(0, ids.size, CALL):
        logits = model(ids[None, at : at + CALL], cache=cache)[0]
        skip = max(0, first - at)
        if skip < logits.shape[0]:
            logits = logits[skip:].astype(mx.float32)
            parts.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
        else:
            mx.eval(logits)
    return np.concatenate(parts)


def nbytes(cache: list[Any], shapes: list[tuple[int, int, int]], tokens: int) -> int:
    """Bytes of an empty cache filled with `tokens` float16 tokens; shapes: (kv_heads, dim_k, dim_v) by layer."""
    for layer, (heads, dim_k, dim_v) in zip(cache, shapes, strict=True):
        for at in range(0, tokens, CALL):
            n = min(CALL, tokens - at)
            k, v = (mx.random.normal((1, heads, n, dim)).astype(mx.float16) for dim in (dim_k, dim_v))
            if isinstance(layer, kv4.mlx.KV4Cache):
                layer.append(k, v)
                layer.seal()
            else:
                mx.eval(layer.update_and_fetch(k, v))
    return kv4.mlx.nbytes(cache)


def run(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    generated: int,
    text: str | None = None,
    bits: int = 4,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Every cache on the first `tokens` tokens of a text (Python's own language reference if none is given), and
    `generated` greedy tokens after half of them. Errors: ValueError for a text that is too short."""
    text = python_reference() if text is None else text
    ids = mx.array(tokenizer.encode(text[: 16 * tokens])[:tokens])
    if ids.size < tokens:
        raise ValueError(f"text: expected at least {tokens} tokens; got {ids.size}")
    own, shapes, own_tokens = None, [], []
    rows = []
    for name, make in caches(bits).items():
        progress(name)
        try:
            cache = make(model)
        except NotImplementedError as error:
            rows.append(Row(name, None, None, None, None, generated, str(error)))
            continue
        logp = log_probabilities(model, ids, cache, tokens // 2)
        if own is None:
            own = logp
            shapes = [(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in cache]
        kl = float(np.mean(np.sum(np.exp(own) * (own - logp), axis=-1)))
        top1 = float(np.mean(own.argmax(-1) == logp.argmax(-1)))
        del logp
        steps = generate_step(ids[: tokens // 2], model, max_tokens=generated, prompt_cache=make(model))
        out = [token for token, _ in steps]
        own_tokens = own_tokens or out
        same = next((i for i, (a, b) in enumerate(zip(out, own_tokens, strict=True)) if a != b), generated)
        rows.append(Row(name, nbytes(make(model), shapes, tokens), kl, top1, same, generated))
    return rows
