"""The kinds of cache layers that a model's config asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from kv4.messages import mismatch
from kv4.per_layer import spread

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Layer types that hold plain keys and values; only their masks differ.
PLAIN_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Layer types that hold a state of linear attention or of a convolution beside them.
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


def per_layer(given: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """One dict of core arguments per layer, float32 contiguous, of the names that have a value there."""
    result: list[dict[str, Any]] = [{} for _ in range(layers)]
    # By the identity of what was given, which is kept until the end: layers given one thing hold one tensor.
    converted: dict[int, tuple[Any, torch.Tensor]] = {}
    for name, index, entry in spread(given, layers):
        if id(entry) not in converted:
            tensor = torch.as_tensor(entry).detach()
            if tensor.dim() != 2:
                raise ValueError(mismatch(f"{name}[{index}]", "a matrix", list(tensor.shape)))
            converted[id(entry)] = entry, tensor.to("cpu", torch.float32).contiguous()
        result[index][name] = converted[id(entry)][1]
    return result


def rows_of_index(indices: Any, batch: int) -> list[int]:
    """Row numbers of an index as torch reads it on a batch: integers (negative from the end), a bool mask, a slice."""
    if isinstance(indices, torch.Tensor):
        indices = indices.cpu()
    return torch.arange(batch)[indices].reshape(-1).tolist()


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of every distinct tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        if id(value) in seen:
            return 0
        seen.add(id(value))
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item, seen) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item, seen) for item in value)
    return 0


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Errors: ValueError where kv4 has no kernels for the tensor's dtype."""
    if x.dtype not in DTYPES:
        raise ValueError(mismatch(name, "float32, float16 or bfloat16", x.dtype))
