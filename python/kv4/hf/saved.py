"""The file of a saved KV4Cache: a header for all layers, then what the core of each has saved, in order.

    8 bytes "kv4model", 4 bytes version, 8 bytes n, n bytes of JSON, 4 bytes CRC-32 of all that (zlib.crc32)

Numbers are little-endian. What a core saves has its own checksums (docs/format.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from kv4.messages import mismatch

from .device import existing_device, new_core, on_stream, place

if TYPE_CHECKING:
    from .cache import KV4Cache, KV4Layer

_MAGIC = b"kv4model"
_VERSION = 1
_FRONT = struct.Struct("<8sIQ")
_CRC = struct.Struct("<I")
_MOST_HEADER = 1 << 24  # bytes; a layer takes under 200


def save(cache: KV4Cache, path: str | os.PathLike[str], seal: bool) -> None:
    """See KV4Cache.save."""
    layers = [_entry(cache, index) for index in range(len(cache.layers))]
    with writing(path, {"recipe": cache.recipe.to_dict(), "layers": layers}) as write:
        for layer in cache.packed_layers():
            if not layer.is_initialized:
                continue
            on_stream(layer)
            core = layer.core
            if seal:
                core = core.clone()  # the layer itself goes on as it is
                core.seal()
            core.save(write)


def _entry(cache: KV4Cache, index: int) -> dict[str, Any]:
    """What the header says of a layer."""
    from .cache import KV4Layer, tensor_bytes

    layer = cache.layers[index]
    if not isinstance(layer, KV4Layer):
        if tensor_bytes(vars(layer), set()):
            raise NotImplementedError(mismatch(f"layers[{index}]", "a layer of kv4", type(layer).__name__))
        return {"type": type(layer).__name__}
    entry = {"type": layer.layer_type, "sliding_window": layer.sliding_window, "record_past": layer.record_past}
    if layer.is_initialized:
        if not hasattr(layer.core, "save"):
            where = place(layer.device)
            raise NotImplementedError(mismatch(f"layers[{index}]", "a layer on the CPU or a CUDA device", where))
        entry["dtype"] = str(layer.dtype).removeprefix("torch.")
        entry["dims"] = [layer.kv_heads, layer.head_dim_k, layer.head_dim_v]
    return entry


def fill(cache: KV4Cache, entries: list[dict[str, Any]], readinto: Callable[[Any], int], device: Any) -> None:
    """The layers of an empty cache from a header's entries and what follows it. device: see KV4Cache.load."""
    if len(entries) != len(cache.layers):
        raise ValueError(mismatch("config", f"{len(entries)} layers, as the file has", len(cache.layers)))
    devices = list(device) if isinstance(device, (list, tuple)) else [device] * len(entries)
    if len(devices) != len(entries):
        raise ValueError(mismatch("device", f"one device, or {len(entries)} of them", len(devices)))
    for index, entry in enumerate(entries):
        mine = _entry(cache, index)
        mine.pop("record_past", None)
        if (message := first_difference(mine, entry, f"layers[{index}]")) is not None:
            raise ValueError(message)
        if "dtype" in entry:
            _fill_layer(cache.layers[index], index, entry, readinto, existing_device("device", devices[index]))


def _fill_layer(
    layer: KV4Layer, index: int, entry: dict[str, Any], readinto: Callable[[Any], int], device: torch.device
) -> None:
    from .cache import DTYPES

    dtype = next((kind for kind, name in DTYPES.items() if name == entry["dtype"]), None)
    dims, record_past = entry.get("dims"), entry.get("record_past")
    if dtype is None or type(record_past) is not bool or not isinstance(dims, list) or len(dims) != 3:
        raise ValueError(mismatch(f"layers[{index}]", "a dtype, three dims and whether the past is recorded", entry))
    if not all(type(n) is int and 0 < n < 1 << 31 for n in dims):
        raise ValueError(mismatch(f"layers[{index}].dims", "kv_heads and two head dims", dims))
    sizes = dict(zip(("kv_heads", "head_dim_k", "head_dim_v"), dims, strict=True))
    window = layer.sliding_window
    core = new_core(device, layer.recipe, dtype=entry["dtype"], sliding_window=window, **sizes, **layer.constants)
    if not hasattr(core, "load"):
        raise NotImplementedError(mismatch("device", "the CPU or a CUDA device", place(device)))
    layer.adopt(core, device, dtype, tuple(dims))
    on_stream(layer)
    core.load(readinto)
    layer.seen, layer.batch = core.length, core.batch
    layer.record_past = record_past
    layer.version += 1


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], header: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """The write of a new file at `path`, behind its header. It is another file until the block has ended without an
    exception, and has reached the disk by then: what was at `path` before is there until the new one is whole."""
    path = Path(path)
    other = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    text = json.dumps(header).encode()
    front = _FRONT.pack(_MAGIC, _VERSION, len(text)) + text
    try:
        with open(other, "xb") as file:
            file.write(front + _CRC.pack(zlib.crc32(front)))
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        os.replace(other, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            other.unlink()
        raise
    if os.name == "posix":  # the new name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Callable[[Any], int]]]:
    """The header of a file that `writing` made, and the readinto of what follows. Errors: OSError; ValueError for other
    bytes, also where the block has not read all of them."""
    with open(path, "rb") as file:
        yield _header(file, path), file.readinto
        if file.read(1):
            raise ValueError(mismatch("path", "the end of the file behind its last layer", f"more bytes in {path}"))


def _header(file: BinaryIO, path: Any) -> dict[str, Any]:
    front = file.read(_FRONT.size)
    if not front.startswith(_MAGIC) or len(front) < _FRONT.size:
        raise ValueError(mismatch("path", "a file of KV4Cache.save", f"other bytes in {path}"))
    _, version, size = _FRONT.unpack(front)
    if version != _VERSION:
        raise ValueError(mismatch("path", f"a file of version {_VERSION}", f"version {version} in {path}"))
    if size > _MOST_HEADER:
        raise ValueError(mismatch("path", f"a header of at most {_MOST_HEADER} bytes", f"one of {size} in {path}"))
    text = file.read(size)
    crc = file.read(_CRC.size)
    if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(front + text):
        raise ValueError(mismatch("path", "a header that fits its checksum", f"a damaged or cut file, {path}"))
    try:
        header = json.loads(text)
        layers = [header["recipe"], *header["layers"]]
    except (ValueError, KeyError, TypeError):
        layers = [None]
    if not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(mismatch("path", "a header of a recipe and layers", f"another one in {path}"))
    return header


def first_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> str | None:
    """The message of the first entry of `mine` that `theirs` has otherwise; None where all are equal."""
    for name, value in mine.items():
        other = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if (inner := first_difference(value, other, f"{where}.{name}")) is not None:
                return inner
        elif value != other:
            return mismatch(f"{where}.{name}", repr(value), repr(other))
    return None
