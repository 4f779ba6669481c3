"""Real text that is part of every Python installation: the topics of the language reference."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def python_reference() -> str:
    """The topics of Python's language reference, about 460,000 characters."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [1, T], with the tokenizer's start token if it has one."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def prompt_ids(tokenizer: Any, tokens: int, text: str | None = None) -> torch.Tensor:
    """The first `tokens` token ids of a text, [1, tokens]; the text is repeated where it is short."""
    text = python_reference() if text is None else text
    # A token stands for less than 16 characters on average in any text a model is used on.
    ids = encode(tokenizer, text[: 16 * tokens])
    while ids.shape[1] < tokens:
        text = text + "\n\n" + text
        ids = encode(tokenizer, text)
    return ids[:, :tokens]
