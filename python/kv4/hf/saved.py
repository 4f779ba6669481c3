"""Saves and loads a KV4Cache: a header with an entry for every layer, then (files.py) each core's saved bytes and the
tensors of layers, or parts of layers, that are transformers' own, in the order of the layers.

What a core saves has its own checksums (docs/format.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from kv4.messages import mismatch
from kv4.recipe import Recipe

from .device import DTYPES, existing_device, on_stream
from .files import Source, described, first_difference, restored, write_tensor, writing
from .layer import KV4Layer
from .states import own_part


def save(layers: Sequence[Any], recipe: Recipe, path: str | os.PathLike[str], seal: bool) -> None:
    """See KV4Cache.save."""
    entries = [_entry(layer, f"layers[{index}]") for index, layer in enumerate(layers)]
    header = {"recipe": recipe.to_dict(), "layers": [entry for entry, _ in entries]}
    with writing(path, header) as write:
        for layer, (entry, tensors) in zip(layers, entries, strict=True):
            if "dtype" in entry:
                on_stream(layer.core, layer.device)
                core = layer.core
                if seal:
                    core = core.clone()  # the layer itself goes on as it is
                    core.seal()
                core.save(write)
            for tensor in tensors:
                write_tensor(tensor, write)


def _entry(layer: Any, where: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What the header says of a layer, and the tensors that stand behind its core, if it has one."""
    entry: dict[str, Any] = {"type": type(layer).__name__}
    tensors: list[torch.Tensor] = []
    if isinstance(layer, KV4Layer):
        entry = {"type": layer.layer_type, "sliding_window": layer.sliding_window, "record_past": layer.record_past}
        bits = [layer.recipe.key.bits, layer.recipe.value.bits] if layer.recipe.bits is None else None
        if bits != [4, 4]:
            entry["bits"] = bits  # None: still to follow from the recipe's budget
        if layer.is_initialized:
            entry["dtype"] = DTYPES[layer.dtype]
            entry["dims"] = [layer.kv_heads, layer.head_dim_k, layer.head_dim_v]
    own = vars(part) if (part := own_part(layer)) is not None else {}
    if described_own := {name: described(value, f"{where}.{name}", tensors) for name, value in own.items()}:
        entry["own"] = described_own
    return entry, tensors


def bits_of(entries: Sequence[dict[str, Any]]) -> dict[int, Any] | None:
    """What a header's entries say of the widths of layers, as KV4Cache takes it."""
    return {index: entry.get("bits", [4, 4]) for index, entry in enumerate(entries)} or None


def fill(layers: Sequence[Any], entries: list[dict[str, Any]], source: Source, device: Any) -> None:
    """Fills the layers of an empty cache from a header's entries and what follows it. device: see KV4Cache.load."""
    if len(entries) != len(layers):
        raise ValueError(mismatch("config", f"{len(entries)} layers, as the file has", len(layers)))
    devices = list(device) if isinstance(device, (list, tuple)) else [device] * len(entries)
    if len(devices) != len(entries):
        raise ValueError(mismatch("device", f"one device, or {len(entries)} of them", len(devices)))
    for index, (layer, entry) in enumerate(zip(layers, entries, strict=True)):
        where = f"layers[{index}]"
        mine, _ = _entry(layer, where)
        mine.pop("record_past", None)
        mine.pop("own", None)
        if (message := first_difference(mine, entry, where)) is not None:
            raise ValueError(message)
        place_of = existing_device("device", devices[index]) if "dtype" in entry or "own" in entry else None
        if "dtype" in entry:
            _fill_core(layer, where, entry, source, place_of)
        if "own" in entry:
            _fill_own(own_part(layer), where, entry["own"], source, place_of)


def _fill_core(layer: KV4Layer, where: str, entry: dict[str, Any], source: Source, device: torch.device) -> None:
    dtype = next((kind for kind, name in DTYPES.items() if name == entry["dtype"]), None)
    dims, record_past = entry.get("dims"), entry.get("record_past")
    if dtype is None or type(record_past) is not bool or not isinstance(dims, list) or len(dims) != 3:
        raise ValueError(mismatch(where, "a dtype, three dims and whether the past is recorded", entry))
    if not all(type(n) is int and 0 < n < 1 << 31 for n in dims):
        raise ValueError(mismatch(f"{where}.dims", "kv_heads and two head dims", dims))
    layer.record_past = record_past
    try:
        layer.load(device, dtype, tuple(dims), source)
    except NotImplementedError as refusal:
        # A CPU serves all that was ever saved, other devices less.
        if device.type != "cpu":
            raise
        raise ValueError(f"{where}: {refusal}") from None


# What a config says of a layer of transformers' own.
_SETTINGS = ("number_of_states", "sliding_window")


def _fill_own(layer: Any, where: str, described_own: Any, source: Source, device: torch.device) -> None:
    """The attributes of a layer of transformers' own, or of the half of one."""
    if layer is None or not isinstance(described_own, dict):
        raise ValueError(mismatch(f"{where}.own", "none" if layer is None else "attributes by name", described_own))
    fresh = vars(layer)
    settings = {name: fresh[name] for name in _SETTINGS if name in fresh}
    if (message := first_difference(settings, described_own, where)) is not None:
        raise ValueError(message)
    for name, value in described_own.items():
        if name not in fresh and (not name.isidentifier() or hasattr(type(layer), name)):
            raise ValueError(mismatch(f"{where}.own", f"attributes of a {type(layer).__name__}", name))
        setattr(layer, name, restored(value, f"{where}.{name}", source, device))
