"""KL divergence, top-1 agreement and perplexity of a cache recipe, against the exact cache.

The text is cut into windows of `length` tokens, each read from an empty cache; the second half of a
window is scored. The exact distribution comes from one full forward with the model's own cache. The
recipe's comes from calls of at most 64 tokens through the packed cache: such a call answers each
query exactly as if the tokens had come one by one, so what is scored is generation, not prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp, nan, sqrt
from typing import Any

import torch

from kv4.bench.generate import KV4, OWN, attention, new_cache
from kv4.bench.text import encode

CALL = 64  # kPageTokens: the longest call that equals one-by-one decoding


@dataclass(frozen=True)
class WindowResult:
    """Sums over one window's scored positions."""

    scored: int
    kl: float  # nats
    same_top1: int
    nll_exact: float  # nats
    nll: float


@dataclass(frozen=True)
class Quality:
    """Means per scored token over all windows; `_se` is the standard error over windows."""

    length: int
    windows: tuple[WindowResult, ...]
    kl: float
    kl_se: float
    top1: float
    top1_se: float
    ppl_exact: float
    ppl: float
    dppl: float  # ppl / ppl_exact - 1
    dppl_se: float
    cache_bytes: int  # at the end of a window
    fp16_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: Any,
    tokenizer: Any,
    text: str,
    recipe: Any = None,
    *,
    windows: int = 10,
    length: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Measures `recipe` (None: kv4's default) on the first `windows` windows of `text`.

    Where the tokenizer starts a text with a special token, each window starts with it too, within
    its `length` tokens. Calls progress(tokens) as tokens are done, 2 * length for each window.
    Errors: ValueError for a text too short, a length below 4 or no window.
    """
    if windows < 1:
        raise ValueError(f"windows: expected at least 1; got {windows}")
    if length < 4:
        raise ValueError(f"length: expected at least 4 tokens; got {length}")
    parts = _windows(tokenizer, text, windows, length)
    results, held, fp16 = [], 0, 0
    for ids in parts:
        result, held, fp16 = _measure_window(model, ids, recipe, progress or (lambda _: None))
        results.append(result)
    return _summary(results, length, held, fp16)


def _windows(tokenizer: Any, text: str, windows: int, length: int) -> list[torch.Tensor]:
    ids = encode(tokenizer, text)[0]
    prefix = encode(tokenizer, "")[0].to(ids.dtype)
    body = ids[len(prefix) :]
    fresh = length - len(prefix)
    if len(body) < windows * fresh:
        raise ValueError(
            f"text: expected at least {windows * fresh} tokens for {windows} windows of {length}; got {len(body)}"
        )
    return [torch.cat([prefix, body[i * fresh : (i + 1) * fresh]])[None] for i in range(windows)]


@torch.inference_mode()
def _measure_window(
    model: Any, ids: torch.Tensor, recipe: Any, progress: Callable[[int], None]
) -> tuple[WindowResult, int, int]:
    from kv4.bench.memory import cache_bytes, fp16_bytes

    length = ids.shape[1]
    first = length // 2
    # Position t predicts token t + 1, so the last position has nothing to be scored on.
    with attention(model, OWN):
        exact = model(
            input_ids=ids,
            past_key_values=new_cache(model, OWN),
            use_cache=True,
            logits_to_keep=length - first,
        ).logits[0]
    progress(length)

    kl = nll_exact = nll = 0.0
    same = 0
    cache = new_cache(model, KV4, recipe)
    with attention(model, KV4, recipe):
        for begin in range(0, length, CALL):
            end = min(begin + CALL, length)
            skip = min(max(first - begin, 0), end - begin)  # rows before the scored half
            keep = max(end - begin - skip, 1)
            logits = model(
                input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=keep
            ).logits[0]
            progress(end - begin)
            scored = min(end, length - 1) - (begin + skip)
            if scored <= 0:
                continue
            at = begin + skip
            p = torch.log_softmax(exact[at - first : at - first + scored].double(), -1)
            q = torch.log_softmax(logits[:scored].double(), -1)
            target = ids[0, at + 1 : at + 1 + scored, None]
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            nll_exact -= float(p.gather(1, target).sum())
            nll -= float(q.gather(1, target).sum())
    result = WindowResult(length - 1 - first, kl, same, nll_exact, nll)
    return result, cache_bytes(cache), fp16_bytes(model.config, length)


def _summary(results: list[WindowResult], length: int, held: int, fp16: int) -> Quality:
    kl, kl_se = _mean([r.kl / r.scored for r in results])
    top1, top1_se = _mean([r.same_top1 / r.scored for r in results])
    exact, _ = _mean([r.nll_exact / r.scored for r in results])
    nll, _ = _mean([r.nll / r.scored for r in results])
    change, change_se = _mean([(r.nll - r.nll_exact) / r.scored for r in results])
    return Quality(
        length=length,
        windows=tuple(results),
        kl=kl,
        kl_se=kl_se,
        top1=top1,
        top1_se=top1_se,
        ppl_exact=_exp(exact),
        ppl=_exp(nll),
        dppl=_exp(change) - 1,
        dppl_se=_exp(change) * change_se,
        cache_bytes=held,
        fp16_bytes=fp16,
    )


def _exp(x: float) -> float:
    return exp(x) if x < 700 else float("inf")


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the latter is nan for one window."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, nan
    return mean, sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
