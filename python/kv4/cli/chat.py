"""`kv4 generate --interactive`: a chat in one cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from kv4.cli.output import mebibytes, out


def words(tokenizer: Any) -> Any:
    """A streamer that prints words as they are generated and records a time for the prompt and for every token."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Stream()


def talk(model: Any, tokenizer: Any, cache: str, recipe: Any, first: str, settings: dict[str, Any]) -> None:
    """Answers `first`, unless it is empty, then messages from the terminal until an empty line. `cache`, `recipe`: as
    for kv4.bench.generate.new_cache; `settings`: arguments of generate()."""
    import torch

    from kv4.bench.generate import attention, new_cache
    from kv4.hf.cache import CACHE_ARGUMENT

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--interactive: expected a model with a chat template; got one without")
    full = full_context(model, cache, recipe)
    out.print("An empty line, or end of input, ends the chat.", style="dim")
    held, known, messages = new_cache(model, cache, recipe), [], []
    with attention(model, cache, recipe):
        while message := first or _line():
            first = ""
            messages.append({"role": "user", "content": message})
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids.to(model.device)
            held = keep(held, common(known[: held.get_seq_length()], ids[0].tolist())) or new_cache(
                model, cache, recipe
            )
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE_ARGUMENT: held},
                streamer=words(tokenizer),
                **settings,
            )
            known = made[0].tolist()
            answer = tokenizer.decode(known[ids.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
            out.print(_held(model, held) + full, style="dim")


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix, without b's last token, which has to be computed."""
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(count, len(b) - 1)


def keep(cache: Any, tokens: int) -> Any:
    """`cache` cropped to its first `tokens` tokens; None where a crop is impossible, as past a sliding window."""
    surplus = cache.get_seq_length() - tokens
    if surplus == 0:
        return cache
    try:
        cache.crop(-surplus)
    except (IndexError, ValueError, RuntimeError, NotImplementedError):
        return None
    return cache if cache.get_seq_length() == tokens else None


def full_context(model: Any, cache: str, recipe: Any) -> str:
    """Bytes of the cache and of fp16 rows at the model's full context length; "" where its config does not say."""
    from kv4.bench.generate import KV4
    from kv4.bench.memory import fp16_bytes, kv4_bytes

    tokens = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not tokens:
        return ""
    fp16 = fp16_bytes(model.config, tokens)
    held = kv4_bytes(model.config, recipe, tokens, model.dtype) if cache == KV4 else fp16 * model.dtype.itemsize // 2
    return f"; at its full {tokens:,} tokens: {mebibytes(held)}, fp16 {mebibytes(fp16)}"


def _held(model: Any, cache: Any) -> str:
    from kv4.bench.memory import cache_bytes, fp16_bytes

    tokens = cache.get_seq_length()
    return f"{tokens:,} tokens: {mebibytes(cache_bytes(cache))}, fp16 {mebibytes(fp16_bytes(model.config, tokens))}"


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
