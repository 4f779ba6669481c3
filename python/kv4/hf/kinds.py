"""The kinds of cache layers that a model's config asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from kv4.messages import mismatch

# Layer types that hold plain keys and values; only their masks differ.
PLAIN_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Layer types with a linear-attention or convolution state beside keys and values.
HYBRID_LAYER_TYPES = ("hybrid", "hybrid_sliding")
PACKED_LAYER_TYPES = (*PLAIN_LAYER_TYPES, *HYBRID_LAYER_TYPES)

_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_warned: set[str] = set()


def layer_kinds(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, arguments of its cache layer) of every layer of a text decoder's config. Older transformers
    (5.17) answer with one set of arguments for all layers, out of which a layer gets those of its type."""
    types, arguments = get_layer_types_and_kwargs(config)
    if not isinstance(arguments, Mapping):
        return list(zip(types, arguments, strict=True))
    windowless = {name: value for name, value in arguments.items() if name != "sliding_window"}
    return [(kind, dict(arguments if kind in _WINDOWED else windowless)) for kind in types]


def served_kinds(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """layer_kinds of a config, each of a type that a cache layer is known for; warns of what stays uncompressed.
    Errors: ValueError for any other type."""
    kinds = layer_kinds(config)
    for index, (kind, _) in enumerate(kinds):
        if kind not in PACKED_LAYER_TYPES and kind not in DYNAMIC_LAYER_TYPE_MAPPING:
            known = ", ".join(sorted({*PACKED_LAYER_TYPES, *DYNAMIC_LAYER_TYPE_MAPPING}))
            raise ValueError(mismatch(f"config.layer_types[{index}]", f"one of {known}", kind))
    _warn_of_uncompressed([kind for kind, _ in kinds])
    return kinds


def _warn_of_uncompressed(types: Sequence[str]) -> None:
    """Warns, once for each reason, where a cache of these layer types holds keys and values as they are."""
    dense = sorted({kind for kind in types if kind not in PACKED_LAYER_TYPES and _holds_tokens(kind)})
    if not any(kind in PACKED_LAYER_TYPES for kind in types):
        found = ", ".join(sorted(set(types))) or "none"
        reason = (
            f"kv4: this KV4Cache compresses nothing: its layers are {found}; kv4 serves {', '.join(PACKED_LAYER_TYPES)}"
        )
    elif dense:
        reason = (
            f"kv4: layers of {', '.join(dense)} keep more than keys and values for every token, so they stay "
            "transformers' own, uncompressed"
        )
    else:
        return
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, UserWarning, stacklevel=5)


def _holds_tokens(kind: str) -> bool:
    return issubclass(DYNAMIC_LAYER_TYPE_MAPPING[kind], CacheLayerMixin)
