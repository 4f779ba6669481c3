"""Passkey retrieval over depth x length, and a long greedy generation compared token by token.

The prompt is filler text with one sentence in it that states a number, and ends where that number comes next, so that
a base model can be asked too. Retrieval is scored by the number's own tokens: whether each is the likeliest (greedy
decoding would then write it), and their mean probability. The task is that of Mohtashami and Jaggi, Landmark Attention,
2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kv4.bench.generate import KV4, OWN, attention, new_cache, prefill
from kv4.bench.text import encode
from kv4.evaluate.quality import Candidate, decoder_outputs
from kv4.evaluate.scores import Head
from kv4.evaluate.state import State, digest
from kv4.hf.cache import CACHE_ARGUMENT

Tensor = torch.Tensor
EXACT = "fp16"  # the name of the model's own cache, in its own dtype


@dataclass(frozen=True)
class Cell:
    cache: str
    length: int
    depth: float  # 0: at the start of the filler, 1: at its end
    found: bool
    probability: float  # geometric mean over the number's tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prompt(tokenizer: Any, filler: str, length: int, depth: float, number: int) -> tuple[Tensor, int]:
    """(ids [1, length], tokens of the answer at its end)."""
    statement = f"\nThe pass key is {number}. Remember it: {number} is the pass key.\n"
    question = "\nWhat is the pass key? The pass key is"
    prefix = encode(tokenizer, "")[0]

    def plain(text: str) -> Tensor:
        return encode(tokenizer, text)[0][len(prefix) :].long()

    asked = plain(question)
    answer = plain(f"{question} {number}")[len(asked) :]
    needle, tail = plain(statement), torch.cat([asked, answer])
    room = length - len(prefix) - len(needle) - len(tail)
    if room < 1:
        raise ValueError(f"lengths: expected at least {length - room + 1} tokens; got {length}")
    body = plain(filler[: 16 * room])
    if len(body) < room:
        raise ValueError(f"text: expected at least {room} tokens of filler; got {len(body)}")
    before = round(depth * room)
    ids = torch.cat([prefix.long(), body[:before], needle, body[before:room], tail])
    return ids[None], len(answer)


@torch.inference_mode()
def needle(
    model: Any,
    tokenizer: Any,
    filler: str,
    candidates: Sequence[Candidate | None],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    state: State | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Cell]:
    """One Cell per candidate (None: the model's own cache), length and depth. The number of a cell depends on its
    length and depth, so that every cache is asked the same. Errors: ValueError for a filler or length too short."""
    state = state or State(None)
    cells = []
    for length in lengths:
        for depth in depths:
            number = 10000 + (7919 * (length + round(1000 * depth))) % 90000
            ids, answer = prompt(tokenizer, filler, length, depth, number)
            first = length - answer - 1
            for candidate in candidates:
                name = EXACT if candidate is None else candidate.name
                about = {} if candidate is None else candidate.key()
                whose = (identity or {}).get("digest")
                key = State.key(kind="needle", model=whose, dtype=str(model.dtype), ids=digest(ids), **about)
                if (kept := state.get(key)) is None:
                    hidden = decoder_outputs(model, ids, candidate, first)[0]
                    log_p = torch.log_softmax(Head(model)(hidden).double(), -1)
                    target = ids[0, first + 1 :]
                    right = bool((log_p.argmax(-1) == target).all())
                    mean = float(log_p.gather(1, target[:, None]).mean().exp())
                    state.put(key, name=name, found=right, probability=mean)
                    kept = state.get(key) or {}
                cells.append(Cell(name, length, depth, kept["found"], kept["probability"]))
                if progress:
                    progress(length)
    return cells


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one cache after the same prompt, against those of the model's own.

    first_difference: index of the first token that differs, the number of tokens where none does. same_place: share
    of places with the same token. forced: share of the own cache's tokens that this cache would have written where it
    was fed the own cache's text all along."""

    cache: str
    text: str
    tokens: int
    first_difference: int
    same_place: float
    forced: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    prompt_ids: Tensor,
    candidates: Sequence[Candidate],
    *,
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Generates `tokens` after prompt_ids [1, T] with the model's own cache and with each packed candidate."""

    def written(cache_kind: str, recipe: Any, forced: list[int] | None) -> list[int]:
        cache = new_cache(model, cache_kind, recipe)
        with attention(model, cache_kind, recipe):
            token = prefill(model, cache, prompt_ids)
            made = [int(token)]
            while len(made) < tokens:
                fed = torch.tensor([[made[-1] if forced is None else forced[len(made) - 1]]])
                logits = model(input_ids=fed, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
                made.append(int(logits[0, -1].argmax()))
                if progress:
                    progress(1)
        return made

    own = written(OWN, None, None)
    results = [Generation(EXACT, tokenizer.decode(own), tokens, tokens, 1.0, 1.0)]
    for candidate in candidates:
        free = written(KV4, candidate.recipe, None)
        forced = written(KV4, candidate.recipe, own)
        differs = [i for i, (a, b) in enumerate(zip(own, free, strict=True)) if a != b]
        results.append(
            Generation(
                candidate.name, tokenizer.decode(free), tokens, differs[0] if differs else tokens,
                1 - len(differs) / tokens, sum(a == b for a, b in zip(own, forced, strict=True)) / tokens,
            )
        )  # fmt: skip
    return results
