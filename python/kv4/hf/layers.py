"""The kinds of cache layers that a model's config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")


def layer_kinds(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, arguments of its cache layer) of every layer of a text decoder's config. Older transformers
    (5.17) answer with one set of arguments for all layers, out of which a layer gets those of its type."""
    types, arguments = get_layer_types_and_kwargs(config)
    if not isinstance(arguments, Mapping):
        return list(zip(types, arguments, strict=True))
    windowless = {name: value for name, value in arguments.items() if name != "sliding_window"}
    return [(kind, dict(arguments if kind in _WINDOWED else windowless)) for kind in types]
