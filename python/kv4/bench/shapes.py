"""Models with random weights, to measure time and memory, which do not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch

_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "llama-3-70b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-tiny": (
        "llama",
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def config_of(shape: str, positions: int = 1 << 18, layers: int | None = None) -> Any:
    """transformers' configuration of a shape of SHAPES, with only its first `layers` if given. Errors: ValueError for
    another shape."""
    from transformers import AutoConfig

    if shape not in _SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}; got {shape!r}")
    kind, settings = _SHAPES[shape]
    if layers is not None:
        settings = {**settings, "num_hidden_layers": layers}
    return AutoConfig.for_model(kind, max_position_embeddings=positions, **settings)


def random_model(shape: str, dtype: torch.dtype, device: torch.device, positions: int = 1 << 18) -> Any:
    """A model of SHAPES with random weights, in eval mode under torch's own attention. Errors: ValueError for another
    shape."""
    from transformers import AutoModelForCausalLM

    config = config_of(shape, positions)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()
