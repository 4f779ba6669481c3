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
from kv4.evaluate.quality import CALL, Candidate, by_calls, decoder_outputs, packed_cache
from kv4.evaluate.scores import Head
from kv4.evaluate.state import State, digest
from kv4.hf.cache import CACHE_ARGUMENT
from kv4.recipe import Recipe

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
    """One cache along what the model's own cache writes greedily after a prompt.

    first_difference: index of the first token that it would have written otherwise, the number of tokens where there is
    none. forced: share of the own cache's tokens that it would have written, fed the own cache's text all along. text:
    of the own cache."""

    cache: str
    prompt: int
    tokens: int
    first_difference: int
    forced: float
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    candidates: Sequence[Candidate],
    *,
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Generates `tokens` after each prompt [1, T], all as long, with the model's own cache, token by token and the
    prompts side by side, and asks each candidate what it would have written where that was fed to it. Up to the first
    difference that is what it writes by itself, and a call of CALL tokens answers as calls of one do. The first row of
    a prompt is the own cache asked so, in one call over all of it: where that differs, rounding alone decides between
    two tokens. Errors: ValueError for prompts of different lengths."""
    lengths = {prompt.shape[1] for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"prompts: expected some of one length; got {sorted(lengths)}")
    tick = progress or (lambda _: None)
    results = []
    written = _written(model, torch.cat(list(prompts)), tokens, tick)
    for index, (prompt, own) in enumerate(zip(prompts, written, strict=True)):
        text = tokenizer.decode(own)
        for candidate in (None, *candidates):
            found = _asked(model, candidate, prompt, own)
            tick(tokens)
            differs = [i for i, (a, b) in enumerate(zip(own, found, strict=True)) if a != b]
            first = differs[0] if differs else tokens
            name = EXACT if candidate is None else candidate.name
            share = 1 - len(differs) / tokens
            results.append(Generation(name, index, tokens, first, share, "" if candidate else text))
    return results


def _written(model: Any, prompts: Tensor, tokens: int, tick: Callable[[int], None]) -> list[list[int]]:
    """What the own cache writes after each of prompts [n, T]."""
    cache = new_cache(model, OWN)
    with attention(model, OWN):
        made = [prefill(model, cache, prompts)]
        while len(made) < tokens:
            logits = model(input_ids=made[-1], **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            made.append(logits[:, -1].argmax(-1, keepdim=True))
            tick(len(prompts))
    return torch.cat(made, 1).tolist()


def _asked(model: Any, candidate: Candidate | None, prompt: Tensor, own: Sequence[int]) -> list[int]:
    """The likeliest token at each place of `own`, which the cache is fed after the prompt."""
    written = torch.tensor([own], device=prompt.device)
    if candidate is None or not isinstance(candidate.recipe, Recipe):
        ids = torch.cat([prompt, written], 1)
        return likeliest(model, decoder_outputs(model, ids, candidate, prompt.shape[1] - 1)[0])
    cache, used = packed_cache(model, candidate)
    with attention(model, KV4, used):
        first = int(prefill(model, cache, prompt))
        hidden = by_calls(model, written, cache, 0)
    return [first, *likeliest(model, hidden)]


def likeliest(model: Any, hidden: Tensor) -> list[int]:
    """The likeliest tokens after the decoder's outputs [positions, hidden]."""
    head = Head(model)
    return [int(token) for part in hidden.split(CALL) for token in head(part).argmax(-1)]
