"""KL divergence, top-1 agreement and perplexity of a cache, against the exact cache.

The text is cut into windows of `length` tokens, each read from an empty cache; the second half of a
window is scored. The exact distribution comes from one full forward with the model's own cache. A
kv4.Recipe's comes from calls of at most 64 tokens through the packed cache: such a call answers each
query exactly as if the tokens had come one by one, so what is scored is generation, not prefill. A
Variant's comes from fake quantisation in one call with the same semantics (kv4.evaluate.simulation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kv4._core import PAGE_TOKENS
from kv4.bench.generate import KV4, OWN, attention
from kv4.bench.memory import cache_bytes, fp16_bytes
from kv4.calibration import Calibration
from kv4.evaluate.scores import Head, Summary, TokenScores, score_many, summarise
from kv4.evaluate.simulation import simulated
from kv4.evaluate.state import State, digest
from kv4.evaluate.variant import Variant
from kv4.evaluate.windows import cut
from kv4.hf import KV4Cache
from kv4.hf.cache import CACHE_ARGUMENT
from kv4.recipe import Recipe

CALL = PAGE_TOKENS  # the longest call that equals one-by-one decoding
_AT_ONCE = 6  # candidates scored against one computation of the exact distributions


@dataclass(frozen=True)
class Candidate:
    """A cache under test: a kv4.Recipe is the packed cache, a Variant fake quantisation."""

    name: str
    recipe: Recipe | Variant
    calibration: Calibration | None = None
    budget: float | None = None  # of a calibration's widths of layers, packed

    @property
    def engine(self) -> str:
        return "packed" if isinstance(self.recipe, Recipe) else "simulated"

    def key(self) -> dict[str, Any]:
        """The key of its results."""
        found = self.to_dict()
        if isinstance(self.recipe, Variant):
            found["recipe"] = self.recipe.differences()
        return found

    def to_dict(self) -> dict[str, Any]:
        found = {"engine": self.engine, "recipe": self.recipe.to_dict()}
        if self.calibration is not None:
            sums = {name: float(x.double().sum()) for name, x in self.calibration.tensors.items()}
            found["calibration"] = digest(sums)
        if self.budget is not None:
            found["budget"] = self.budget
        return found


@dataclass(frozen=True)
class Quality(Summary):
    """A Summary, with bytes at the end of a window: of the packed cache, 0 for a simulation, and of fp16."""

    length: int
    cache_bytes: int
    fp16_bytes: int
    scores: tuple[TokenScores, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "scores"}


def measure(
    model: Any,
    tokenizer: Any,
    text: str,
    recipe: Recipe | Variant | None = None,
    *,
    windows: int = 10,
    length: int = 2048,
    calibration: Calibration | None = None,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Measures one recipe (None: kv4's default) on the first `windows` windows of `text`. See measure_all."""
    one = Candidate("recipe", recipe if recipe is not None else Recipe(), calibration)
    return measure_all(model, cut(tokenizer, text, windows, length), [one], progress=progress)["recipe"]


@torch.inference_mode()
def measure_all(
    model: Any,
    windows: Sequence[torch.Tensor],
    candidates: Sequence[Candidate],
    *,
    state: State | None = None,
    identity: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
    progress: Callable[[int], None] | None = None,
    found: Callable[[int, str, TokenScores], None] | None = None,
) -> dict[str, Quality]:
    """Measures every candidate on windows of ids [1, T], the second half of each scored.

    state: results already there are not computed again, new ones are added; `identity` (of the model) goes into their
    keys. scratch: a folder for the exact model's outputs, so that another run saves that pass. Calls progress(tokens)
    for every window and candidate, and found(window, name, scores) as each result is known.
    Errors: ValueError for a recipe that does not serve the model, two candidates of one name, or no window.
    """
    if len({c.name for c in candidates}) < len(candidates):
        raise ValueError(f"candidates: expected different names; got {[c.name for c in candidates]}")
    if not windows:
        raise ValueError("windows: expected at least 1; got 0")
    state = state or State(None)
    tick = progress or (lambda _: None)
    kept: dict[str, list[TokenScores]] = {c.name: [] for c in candidates}
    held: dict[str, int] = {}
    for index, ids in enumerate(windows):
        keys = {c.name: _key(model, ids, c, identity) for c in candidates}
        todo = [c for c in candidates if state.get(keys[c.name]) is None]
        tick(ids.shape[1] * (len(candidates) - len(todo)))
        exact = exact_outputs(model, ids, scratch, identity) if todo else None
        for some in (todo[i : i + _AT_ONCE] for i in range(0, len(todo), _AT_ONCE)):
            outputs, sizes = [], []
            for candidate in some:
                hidden, size = decoder_outputs(model, ids, candidate, ids.shape[1] // 2)
                outputs.append(hidden)
                sizes.append(size)
                tick(ids.shape[1] // 2)
            first = ids.shape[1] // 2
            half = (ids.shape[1] - ids.shape[1] // 2) / max(len(exact), 1)
            results = score_many(
                Head(model), exact, outputs, ids[0, first + 1 :], lambda n, half=half: tick(n * half)
            )  # fmt: skip
            for candidate, size, scores in zip(some, sizes, results, strict=True):
                state.put(
                    keys[candidate.name], scores, name=candidate.name, window=index, length=ids.shape[1],
                    model=(identity or {}).get("name"), bytes=size, **candidate.to_dict(),
                )  # fmt: skip
        for candidate in candidates:
            scores = state.scores(keys[candidate.name])
            assert scores is not None
            kept[candidate.name].append(scores)
            held[candidate.name] = (state.get(keys[candidate.name]) or {}).get("bytes", 0)
            if found:
                found(index, candidate.name, scores)
    length = windows[0].shape[1]
    return {c.name: quality_of(kept[c.name], model.config, length, held[c.name]) for c in candidates}


def quality_of(scores: Sequence[TokenScores], config: Any, length: int, cache_bytes: int = 0) -> Quality:
    return Quality(
        **asdict(summarise(scores)),
        length=length,
        cache_bytes=cache_bytes,
        fp16_bytes=fp16_bytes(config, length),
        scores=tuple(scores),
    )


def _key(model: Any, ids: torch.Tensor, candidate: Candidate, identity: Mapping[str, Any] | None) -> str:
    where = {} if model.device.type == "cpu" else {"device": model.device.type}
    return State.key(
        model=(identity or {}).get("digest"), dtype=str(model.dtype), window=digest(ids), **where, **candidate.key()
    )


@torch.inference_mode()
def exact_outputs(
    model: Any, ids: torch.Tensor, scratch: Path | None, identity: Mapping[str, Any] | None
) -> torch.Tensor:
    """The exact model's outputs at positions T / 2 ... T - 2, kept in `scratch` where there is one."""
    file = None
    if scratch is not None and identity is not None:
        where = [] if model.device.type == "cpu" else [model.device.type]
        name = digest([identity.get("digest"), str(model.dtype), digest(ids), *where])
        file = scratch / f"{name}.safetensors"
        if file.is_file():
            return load_file(file)["hidden"].to(model.device)
    hidden = decoder_outputs(model, ids, None, ids.shape[1] // 2)[0]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({"hidden": hidden.clone().contiguous()}, str(part))
        part.replace(file)
    return hidden


def decoder_outputs(model: Any, ids: torch.Tensor, candidate: Candidate | None, first: int) -> tuple[torch.Tensor, int]:
    """(the decoder's outputs at positions `first` ... T - 2 of ids [1, T], [positions, hidden]; bytes of the packed
    cache at the end, 0 for others). candidate None: one call with the model's own attention."""
    decoder = model.get_decoder()
    ids = ids.to(model.device)
    if candidate is None:
        with attention(model, OWN):
            return decoder(input_ids=ids, use_cache=False).last_hidden_state[0, first:-1], 0
    if not isinstance(candidate.recipe, Recipe):
        with simulated(model, candidate.recipe, candidate.calibration):
            return decoder(input_ids=ids, use_cache=False).last_hidden_state[0, first:-1], 0
    cache, used = packed_cache(model, candidate)
    with attention(model, KV4, used):
        return by_calls(model, ids, cache, first), cache_bytes(cache)


def packed_cache(model: Any, candidate: Candidate) -> tuple[KV4Cache, Recipe | None]:
    """(the cache of a packed candidate, the recipe that the model's attention is to be attached with)."""
    given = {} if candidate.calibration is None else candidate.calibration.arguments(candidate.budget)
    given.pop("recipe", None)
    return KV4Cache(model.config, candidate.recipe, **given), None if given else candidate.recipe


def by_calls(
    model: Any, ids: torch.Tensor, cache: Any, first: int, progress: Callable[[int], None] = lambda tokens: None
) -> torch.Tensor:
    """The decoder's outputs at positions `first` ... T - 2 of ids [1, T], which go into the cache by calls of CALL
    tokens: [positions, hidden]."""
    parts = []
    for begin in range(0, ids.shape[1], CALL):
        block = ids[:, begin : begin + CALL]
        hidden = model.get_decoder()(input_ids=block, **{CACHE_ARGUMENT: cache}, use_cache=True).last_hidden_state
        if begin + block.shape[1] > first:
            parts.append(hidden[0, max(first - begin, 0) :])
        progress(block.shape[1])
    return torch.cat(parts)[:-1]
