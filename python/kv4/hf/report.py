"""What the layers of a cache hold, in bytes and in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kv4.shared import total_bytes


def nbytes(layers: Iterable[Any]) -> int:
    """See KV4Cache.nbytes."""
    cores = [layer.core for layer in layers if getattr(layer, "core", None) is not None]
    return total_bytes(cores) + sum(_own_bytes(layer) for layer in layers)


def _own_bytes(layer: Any) -> int:
    """Of a layer of transformers' own, or of the half of a packed one."""
    own = layer if not hasattr(layer, "core") else getattr(layer, "states", None)
    return 0 if own is None else tensor_bytes(vars(own), set())


def describe(layers: Iterable[Any]) -> list[dict[str, Any]]:
    """See KV4Cache.describe."""
    return [{"index": index, **_described(layer)} for index, layer in enumerate(layers)]


def _described(layer: Any) -> dict[str, Any]:
    if not hasattr(layer, "core"):
        return {"type": type(layer).__name__, "nbytes": _own_bytes(layer)}
    row = {"type": layer.layer_type, "nbytes": layer.nbytes(), "tokens": layer.seen}
    row["sliding_window"] = layer.sliding_window
    if layer.core is not None:
        batch = range(layer.core.batch)
        row |= {
            "shared": sum(nbytes for _, nbytes, _ in layer.core.shared()),
            "first": layer.core.first,
            "sealed": [layer.core.sealed_tokens(b) for b in batch],
            "exact": [layer.core.exact_tokens(b) for b in batch],
            "kv_heads": layer.kv_heads,
            "head_dim": (layer.head_dim_k, layer.head_dim_v),
            "dtype": str(layer.dtype).removeprefix("torch."),
        }
    return row


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
