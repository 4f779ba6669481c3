"""A text cut into windows of tokens."""

from __future__ import annotations

from typing import Any

import torch

from kv4.bench.text import encode


def cut(tokenizer: Any, text: str, windows: int, length: int, first: int = 0) -> list[torch.Tensor]:
    """Token ids [1, length] of windows `first` ... `first + windows - 1` of a text, one after another from its start,
    each started with whatever the tokenizer puts before a text. Errors: ValueError for a text too short, a length
    below 4 or no window."""
    return _every(tokenizer, text, windows, length, first)[first : first + windows]


def spread(tokenizer: Any, text: str, windows: int, length: int) -> list[torch.Tensor]:
    """As `cut`, windows from places spread evenly over the text, the first from its start. Errors: as cut."""
    every = _every(tokenizer, text, windows, length, 0)
    return [every[index * len(every) // windows] for index in range(windows)]


def _every(tokenizer: Any, text: str, windows: int, length: int, first: int) -> list[torch.Tensor]:
    if windows < 1:
        raise ValueError(f"windows: expected at least 1; got {windows}")
    if length < 4:
        raise ValueError(f"length: expected at least 4 tokens; got {length}")
    ids = encode(tokenizer, text)[0]
    prefix = encode(tokenizer, "")[0].to(ids.dtype)
    body = ids[len(prefix) :]
    fresh = length - len(prefix)
    if len(body) < (first + windows) * fresh:
        raise ValueError(
            f"text: expected at least {(first + windows) * fresh} tokens for {first + windows} windows of {length}; "
            f"got {len(body)}"
        )
    return [torch.cat([prefix, body[i : i + fresh]])[None] for i in range(0, len(body) - fresh + 1, fresh)]
