"""Milliseconds per generated token: the model's own cache against kv4, on one machine, in one run.

The own cache is transformers' DynamicCache under scaled_dot_product_attention; kv4's exact cache has rows of the
model's dtype under kv4's attention, as a second baseline. All decode greedily through the model's forward pass, each
from a copy of its own prefilled cache, so every repeat does the same work; the copy and the prefill are not timed. With
neighbours each repeat is run twice, without and with busy processes beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache

from kv4 import Recipe
from kv4.bench.memory import cache_bytes, fp16_bytes, kv_shape
from kv4.bench.neighbours import neighbours as beside
from kv4.hf import DecodeGraph, KV4Cache, attach, detach
from kv4.hf.cache import CACHE_ARGUMENT

OWN, KV4, EXACT, GRAPH = "own", "kv4", "kv4 exact", "kv4 graph"
PREFILL_CHUNK = 512
FILL_CHUNK = {"cpu": 512, "cuda": 4096}
# Untimed tokens at the start of a repeat: the first finds the copied cache outside the CPU's
# caches, and the second is the first after kv4 has sealed the prefill's pages.
WARM_UP = 2
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
# A dtype this much slower than the other after one repeat is dropped.
DROP = 1.5


@dataclass
class Decoded:
    """One repeat: the tokens and the seconds that each took."""

    tokens: list[int]  # of the batch's first sequence
    seconds: list[float]
    last: torch.Tensor  # [batch, 1], the newest tokens

    @property
    def ms_per_token(self) -> float:
        """The mean, so that the time to seal a page is spread over its 64 tokens."""
        return 1e3 * sum(self.seconds) / len(self.seconds)


@dataclass
class Row:
    """Measurements of one cache at one context length, in one dtype.

    generated: the prefill's token, those of the warm-up and the timed ones, of the batch's first sequence. Bytes are
    those at the end. loaded_ms: the repeats beside busy neighbours. fits: False where memory ran out; the row then has
    no figures.
    """

    context: int
    cache: str
    dtype: str
    cache_bytes: int
    fp16_bytes: int
    repeats_ms: list[float] = field(default_factory=list)
    generated: list[int] = field(default_factory=list, repr=False)
    prefill_seconds: float = 0.0
    best: bool = False
    batch: int = 1
    fits: bool = True
    loaded_ms: list[float] = field(default_factory=list)

    @property
    def ms_per_token(self) -> float:
        return median(self.repeats_ms) if self.repeats_ms else float("nan")

    @property
    def loaded_ms_per_token(self) -> float:
        return median(self.loaded_ms) if self.loaded_ms else float("nan")

    @property
    def slowdown(self) -> float:
        """How many times as long a token takes beside the neighbours."""
        return self.loaded_ms_per_token / self.ms_per_token

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16."""
        return self.fp16_bytes / self.cache_bytes if self.cache_bytes else float("nan")

    def to_dict(self) -> dict[str, Any]:
        figures = {"ms_per_token": self.ms_per_token, "ratio_to_fp16": self.ratio}
        if self.loaded_ms:
            figures |= {"loaded_ms_per_token": self.loaded_ms_per_token, "slowdown": self.slowdown}
        return {**asdict(self), **figures}


@contextmanager
def attention(model: Any, cache: str, recipe: Any = None) -> Iterator[None]:
    """Runs a model with the attention that belongs to a cache, and restores the previous one.

    Errors: ValueError with kv4.hf.attach's reason where kv4 does not support the model with this recipe.
    """
    before = model.config._attn_implementation
    if cache != OWN:
        if before == "kv4":  # attached by the caller, who may detach it later
            yield
            return
        attach(model, recipe)
        try:
            yield
        finally:
            detach(model)
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def new_cache(model: Any, cache: str, recipe: Any = None, **given: Any) -> Any:
    """given: what else KV4Cache takes."""
    return DynamicCache(config=model.config) if cache == OWN else KV4Cache(model.config, recipe, **given)


@torch.inference_mode()
def prefill(
    model: Any,
    cache: Any,
    ids: torch.Tensor,
    *,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Feeds ids [batch, T] in chunks and returns the next tokens, [batch, 1]."""
    logits = None
    for part in ids.split(chunk, dim=1):
        logits = model(input_ids=part, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits
        if progress is not None:
            progress(part.shape[1])
    if logits is None:
        raise ValueError("ids: expected at least one token; got none")
    return logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def fill(model: Any, cache: Any, ids: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """As prefill, with random keys and values for all of ids [batch, T] but the last token: the time of a decode step
    does not depend on them, and a long prompt takes minutes on a slow machine. Returns the next tokens, [batch, 1]."""
    config = model.config.get_text_config(decoder=True)
    heads, dim = kv_shape(config)
    generator = torch.Generator(ids.device).manual_seed(seed)
    options = {"generator": generator, "dtype": model.dtype, "device": ids.device}
    # A cache's layers exist, and kv4's have recorded queries, only after a first token.
    model(input_ids=ids[:, :1], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    for part in ids[:, 1:-1].split(FILL_CHUNK[ids.device.type], dim=1):
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(part.shape[0], heads, part.shape[1], dim, **options) for _ in "kv")
            cache.update(k, v, layer)
    logits = model(input_ids=ids[:, -1:], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def decode(
    model: Any,
    cache: Any,
    token: torch.Tensor,
    tokens: int,
    *,
    step: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Generates `tokens` tokens greedily after `token` [batch, 1], never stopping early. step: from tokens to logits;
    the model's forward if not given."""

    def forward(token: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits

    step = step or forward
    produced, seconds = [int(token[0])], []
    for _ in range(tokens):
        begin = perf_counter()
        token = step(token)[:, -1].argmax(-1, keepdim=True)
        produced.append(int(token[0]))  # synchronises with a CUDA device
        seconds.append(perf_counter() - begin)
        if progress is not None:
            progress(1)
    return Decoded(produced, seconds, token)


def run(
    models: Mapping[str, Any],
    ids: torch.Tensor,
    contexts: Sequence[int],
    *,
    tokens: int = 64,
    repeats: int = 5,
    recipe: Any = None,
    exact: bool = False,
    random_fill: bool = False,
    neighbours: int = 0,
    pin: bool = True,
    progress: Callable[[str, int], None] | None = None,
) -> list[Row]:
    """Measures every cache in every dtype at every context length; `exact` adds kv4's exact cache, a CUDA device
    kv4's steps as a captured graph, `random_fill` replaces prompts by `fill`. neighbours: busy processes beside which
    every repeat is measured again (`pin`: see kv4.bench.neighbours); 0: none.

    models: the same model per dtype. ids: [batch, >= max(contexts)], on the models' device. A repeat decodes `tokens`
    tokens of every sequence and runs all candidates. Calls progress(what, tokens done) after every step.
    A candidate that runs out of memory is dropped.
    """
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < 1:
        raise ValueError(f"contexts: expected positive token counts; got {contexts}")
    if ids.shape[1] < contexts[-1]:
        raise ValueError(f"ids: expected at least {contexts[-1]} tokens; got {ids.shape[1]}")
    if tokens < 1 or repeats < 1:
        raise ValueError(f"tokens, repeats: expected at least 1; got {tokens}, {repeats}")
    if neighbours < 0:
        raise ValueError(f"neighbours: expected at least 0; got {neighbours}")

    def step(what: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(what, done)

    batch = ids.shape[0]
    caches = (OWN, KV4, *((EXACT,) if exact else ()), *((GRAPH,) if ids.is_cuda else ()))
    recipes = {OWN: None, KV4: recipe, EXACT: Recipe.exact(), GRAPH: recipe}
    candidates = [(cache, dtype) for dtype in models for cache in caches]
    held: dict[tuple[str, str], Any] = {}
    prefilled = dict.fromkeys(candidates, 0.0)
    rows: list[Row] = []
    before = 0
    for context in contexts:
        here: dict[tuple[str, str], tuple[Row, torch.Tensor]] = {}
        for key in candidates:
            cache_name, dtype = key
            model = models[dtype]
            if key not in held:
                held[key] = new_cache(model, cache_name, recipes[cache_name])
            what = f"prefill {context}: {cache_name} {dtype}"
            fp16 = fp16_bytes(model.config, context + WARM_UP + tokens, batch)
            row = Row(context, cache_name, dtype, 0, fp16, batch=batch)
            rows.append(row)
            begin = perf_counter()
            try:
                with attention(model, cache_name, recipes[cache_name]):
                    part = ids[:, before:context]
                    if random_fill:
                        token = fill(model, held[key], part)
                    else:
                        token = prefill(model, held[key], part, progress=step(what))
                    int(token[0])  # synchronises with a CUDA device
            except OUT_OF_MEMORY:
                row.fits = False
            if not row.fits:  # not in the handler, whose traceback holds the failed call's tensors
                held[key] = None
                _return_memory(ids.device)
                continue
            prefilled[key] += perf_counter() - begin
            row.prefill_seconds = prefilled[key]
            here[key] = (row, token)
        candidates = [key for key in candidates if key in here]
        for repeat in range(repeats):
            for busy in (0, neighbours) if neighbours else (0,):
                with beside(busy, pin=pin):
                    for key in list(candidates):
                        row, token = here[key]
                        model, used = models[row.dtype], recipes[row.cache]
                        what = f"decode at {context}: {row.cache} {row.dtype}" + (", neighbours" if busy else "")
                        try:
                            _repeat(row, model, held[key], token, tokens, used, bool(busy), step(what))
                        except OUT_OF_MEMORY:
                            row.fits, row.repeats_ms, row.loaded_ms = False, [], []
                        if not row.fits:
                            held[key] = None
                            candidates.remove(key)
                            _return_memory(ids.device)
            if repeat == 0:
                candidates = [key for key in candidates if not _dropped(here, key)]
                held = {key: held[key] for key in candidates}
        for name in caches:
            finished = [row for row, _ in here.values() if row.cache == name and len(row.repeats_ms) == repeats]
            if finished:
                min(finished, key=lambda row: row.ms_per_token).best = True
        before = context
    return rows


def _repeat(
    row: Row,
    model: Any,
    held: Any,
    token: torch.Tensor,
    tokens: int,
    recipe: Any,
    loaded: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """One repeat of one candidate, from a copy of its prefilled cache; the result is added to its row."""
    cache = deepcopy(held)
    with attention(model, row.cache, recipe):
        graph = DecodeGraph(model, cache) if row.cache == GRAPH else None
        warm = decode(model, cache, token, WARM_UP, step=graph)
        timed = decode(model, cache, warm.last, tokens, step=graph, progress=progress)
    (row.loaded_ms if loaded else row.repeats_ms).append(timed.ms_per_token)
    row.generated = warm.tokens + timed.tokens[1:]
    row.cache_bytes = cache_bytes(cache)


def _dropped(here: Mapping[tuple[str, str], tuple[Row, torch.Tensor]], key: tuple[str, str]) -> bool:
    own = here[key][0].ms_per_token
    return own > DROP * min(row.ms_per_token for row, _ in here.values() if row.cache == key[0] and row.repeats_ms)


def _return_memory(device: torch.device) -> None:
    """Frees the memory of a failed candidate for the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def best_of(rows: Sequence[Row], cache: str) -> dict[int, Row]:
    """One cache in its best dtype, by context length; empty where it was not measured."""
    return {row.context: row for row in rows if row.best and row.cache == cache}


def best_rows(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(own, kv4) per context length, each in its best dtype; one that did not fit has no figures."""
    best = {(row.context, row.cache): row for row in sorted(rows, key=lambda row: row.best)}
    lacking = [c for c in sorted({row.context for row in rows}) if (c, OWN) not in best or (c, KV4) not in best]
    for context in lacking:  # dropped at a shorter context: it would not fit here either
        other = next(row for (c, _), row in best.items() if c == context)
        for name in (OWN, KV4):
            gone = Row(context, name, other.dtype, 0, other.fp16_bytes, batch=other.batch, fits=False)
            best.setdefault((context, name), gone)
    return [(best[c, OWN], best[c, KV4]) for c in sorted({row.context for row in rows})]
