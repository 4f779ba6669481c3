"""Other caches at their own settings, on the same windows.

llama.cpp has its own weights' arithmetic, so its quantised caches are compared with its own f16 cache; transformers'
QuantizedCache with the same exact model as kv4. Both are fed generation's way: llama.cpp writes a batch into its cache
before attending to it, QuantizedCache gets calls of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import QuantizedCache

from kv4.bench.generate import OWN, attention
from kv4.bench.llama import BATCH, load, require
from kv4.evaluate.quality import by_calls
from kv4.evaluate.scores import Head, TokenScores, score_many
from kv4.evaluate.state import State, digest

Tensor = torch.Tensor
LLAMA_TYPES = ("q8_0", "q4_0")


def llama_key(gguf: Path, ids: Tensor, kind: str) -> str:
    return State.key(kind="llama", file=gguf.name, size=gguf.stat().st_size, window=digest(ids), type=kind)


def measure_llama(
    gguf: Path,
    windows: Sequence[Tensor],
    state: State,
    *,
    types: Sequence[str] = LLAMA_TYPES,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[TokenScores]]:
    """llama.cpp's caches of `types` (both keys and values) against its f16 cache on windows of ids [1, T], the second
    halves scored. The ids are those of the HuggingFace tokenizer. Errors: ValueError without llama-cpp-python."""
    require()
    tick = progress or (lambda _: None)

    def logits(ids: Tensor, kind: str) -> Tensor:
        model = load(gguf, kind, ids.shape[1], threads, logits_all=True)
        try:
            tokens = ids[0].tolist()
            for lo in range(0, len(tokens), BATCH):
                model.eval(tokens[lo : lo + BATCH])
                tick(len(tokens[lo : lo + BATCH]))
            return torch.from_numpy(model.scores[len(tokens) // 2 : len(tokens) - 1].copy())
        finally:
            model.close()

    found: dict[str, list[TokenScores]] = {kind: [] for kind in types}
    for index, ids in enumerate(windows):
        todo = [kind for kind in types if state.get(llama_key(gguf, ids, kind)) is None]
        exact = logits(ids, "f16") if todo else None
        tick(ids.shape[1] * (len(types) - len(todo) + (not todo)))
        for kind in todo:
            scores = score_many(
                torch.clone, exact, [logits(ids, kind)], ids[0, ids.shape[1] // 2 + 1 :]
            )[0]  # fmt: skip
            key = llama_key(gguf, ids, kind)
            state.put(key, scores, name=f"llama.cpp {kind}", window=index, length=ids.shape[1], model=gguf.stem)
        for kind in types:
            kept = state.scores(llama_key(gguf, ids, kind))
            assert kept is not None
            found[kind].append(kept)
    return found


@torch.inference_mode()
def measure_hf(
    model: Any,
    windows: Sequence[Tensor],
    exact: Callable[[Tensor], Tensor],
    state: State,
    *,
    backend: str,
    identity: dict[str, Any],
    nbits: int = 4,
    progress: Callable[[int], None] | None = None,
) -> list[TokenScores]:
    """transformers' QuantizedCache with its defaults (groups of 64, newest 128 exact) and `nbits`. exact(ids): the
    exact decoder's outputs at positions T / 2 ... T - 2. Errors: ValueError with the library's reason where it cannot
    serve the model or is not installed."""
    tick = progress or (lambda _: None)
    found = []
    for index, ids in enumerate(windows):
        key = State.key(kind="hf", backend=backend, nbits=nbits, model=identity.get("digest"), window=digest(ids))
        if (kept := state.scores(key)) is None:
            try:
                cache = QuantizedCache(backend, model.config, nbits=nbits)
            except ImportError as error:
                raise ValueError(f"backend: expected {backend} to be installed; got {error}") from None
            first = ids.shape[1] // 2
            with attention(model, OWN):
                hidden = by_calls(model, ids, cache, first, tick)
            kept = score_many(Head(model), exact(ids), [hidden], ids[0, first + 1 :])[0]
            state.put(key, kept, name=f"QuantizedCache {backend}", window=index, length=ids.shape[1])
        else:
            tick(ids.shape[1])
        found.append(kept)
    return found
