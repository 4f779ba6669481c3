"""What the layers of a cache hold, in bytes and in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kv4.shared import total_bytes

from .layer import KV4Layer
from .states import own_part, tensor_bytes


def nbytes(layers: Iterable[Any]) -> int:
    """See KV4Cache.nbytes."""
    cores = [layer.core for layer in layers if isinstance(layer, KV4Layer) and layer.core is not None]
    own = [part for layer in layers if (part := own_part(layer)) is not None]
    return total_bytes(cores) + sum(tensor_bytes(vars(part), set()) for part in own)


def describe(layers: Iterable[Any]) -> list[dict[str, Any]]:
    """See KV4Cache.describe."""
    return [{"index": index, **_described(layer)} for index, layer in enumerate(layers)]


def _described(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, KV4Layer):
        return {"type": type(layer).__name__, "nbytes": tensor_bytes(vars(layer), set())}
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
