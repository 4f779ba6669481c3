"""Files of a JSON header and bytes behind it, written whole or not at all, read to the last byte.

    8 bytes "kv4model", 4 bytes version, 8 bytes n, n bytes of JSON, 4 bytes CRC-32 of all that (zlib.crc32)

Numbers are little-endian. Tensors stand behind the header by their bytes, each with its CRC-32.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch

from kv4.messages import mismatch
from kv4.whole import file_path, written_whole

_MAGIC = b"kv4model"
_VERSION = 1
_FRONT = struct.Struct("<8sIQ")
_CRC = struct.Struct("<I")
_MOST_HEADER = 1 << 24  # bytes; a layer takes under 400
_TENSOR_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
}


class Source:
    """What follows a header, read from `file`. Reading past its end raises ValueError that counts what is missing."""

    def __init__(self, file: BinaryIO, name: Any) -> None:
        self.file = file
        self.name = name

    def readinto(self, buffer: Any) -> int:
        """Fills the whole buffer; returns its bytes."""
        view = memoryview(buffer).cast("B")
        start, got = self.file.tell(), 0
        while got < len(view):
            n = self.file.readinto(view[got:])  # type: ignore[attr-defined]
            if not n:
                raise ValueError(_cut(len(view), start, got, self.name))
            got += n
        return got

    def check_left(self, nbytes: int) -> None:
        """Errors: ValueError where the file has fewer bytes left."""
        start = self.file.tell()
        left = self.file.seek(0, os.SEEK_END) - start
        self.file.seek(start)
        if left < nbytes:
            raise ValueError(_cut(nbytes, start, left, self.name))


def _cut(expected: int, start: int, got: int, name: Any) -> str:
    return mismatch("path", f"{expected} bytes more after byte {start}", f"{got}: the file is cut, {name}")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], header: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """The write of a new file at `path`, behind its header; whole or not at all."""
    text = json.dumps(header).encode()
    front = _FRONT.pack(_MAGIC, _VERSION, len(text)) + text
    with written_whole(path) as file:
        file.write(front + _CRC.pack(zlib.crc32(front)))
        yield file.write


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Source]]:
    """The header of a file that `writing` made, and what follows. Errors: OSError; ValueError for other bytes, also
    where the block has not read all of them."""
    with file_path(path).open("rb") as file:
        yield _header(file, path), Source(file, path)
        if file.read(1):
            raise ValueError(mismatch("path", "the end of the file behind its last layer", f"more bytes in {path}"))


def _header(file: BinaryIO, path: Any) -> dict[str, Any]:
    front = file.read(_FRONT.size)
    if len(front) < _FRONT.size and (front + _MAGIC[len(front) :]).startswith(_MAGIC):
        raise ValueError(_cut(_FRONT.size, 0, len(front), path))
    if not front.startswith(_MAGIC):
        raise ValueError(mismatch("path", "a file of KV4Cache.save", f"other bytes in {path}"))
    _, version, size = _FRONT.unpack(front)
    if version != _VERSION:
        raise ValueError(mismatch("path", f"a file of version {_VERSION}", f"version {version} in {path}"))
    if size > _MOST_HEADER:
        raise ValueError(mismatch("path", f"a header of at most {_MOST_HEADER} bytes", f"one of {size} in {path}"))
    rest = file.read(size + _CRC.size)
    if len(rest) < size + _CRC.size:
        raise ValueError(_cut(size + _CRC.size, _FRONT.size, len(rest), path))
    text, crc = rest[:size], rest[size:]
    if _CRC.unpack(crc)[0] != zlib.crc32(front + text):
        raise ValueError(mismatch("path", "a header that fits its checksum", f"a damaged file, {path}"))
    try:
        header = json.loads(text)
        layers = [header["recipe"], *header["layers"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        layers = [None]
    if not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(mismatch("path", "a header of a recipe and layers", f"another one in {path}"))
    return header


def described(value: Any, where: str, tensors: list[torch.Tensor]) -> Any:
    """`value` (tensors, numbers, strings and containers of them) as JSON; its tensors are added to `tensors`, in the
    order in which write_tensor has to follow. Errors: NotImplementedError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and str(value.dtype).removeprefix("torch.") in _TENSOR_DTYPES:
        tensors.append(value)
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"type": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # a loaded one is where its layer is
    if isinstance(value, dict) and all(isinstance(key, (int, str)) for key in value):
        return {"dict": [[key, described(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [described(item, f"{where}[{at}]", tensors) for at, item in enumerate(value)]
        return {type(value).__name__: items}
    raise NotImplementedError(mismatch(where, "tensors, numbers, strings or containers of them", type(value).__name__))


def restored(description: Any, where: str, source: Source, device: torch.device) -> Any:
    """The value that `described` describes, its tensors read from `source` in the same order and put on `device`.
    Errors: ValueError for what describes no value; for a cut or damaged file."""
    if description is None or isinstance(description, (bool, int, float, str)):
        return description
    if isinstance(description, dict):
        if description.keys() == {"tensor", "dtype"}:
            return read_tensor(description["tensor"], description["dtype"], where, source).to(device)
        if description.keys() == {"type"} and (dtype := _dtype(description["type"])) is not None:
            return dtype
        if description == {"device": None}:
            return device
        kind, items = next(iter(description.items()), (None, None))
        if len(description) == 1 and isinstance(items, list):
            if kind in ("list", "tuple"):
                values = [restored(item, f"{where}[{at}]", source, device) for at, item in enumerate(items)]
                return values if kind == "list" else tuple(values)
            pairs = all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (int, str)) for pair in items)
            if kind == "dict" and pairs:
                return {key: restored(item, f"{where}[{key!r}]", source, device) for key, item in items}
    raise ValueError(mismatch(where, "a tensor's shape and dtype, a number, a string or a container", description))


def _dtype(name: Any) -> torch.dtype | None:
    return _TENSOR_DTYPES.get(name) if isinstance(name, str) else None


def write_tensor(tensor: torch.Tensor, write: Callable[[Any], Any]) -> None:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    write(data)
    write(_CRC.pack(zlib.crc32(data)))


def read_tensor(shape: Any, dtype: Any, where: str, source: Source) -> torch.Tensor:
    kind = _dtype(dtype)
    if kind is None or not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(mismatch(where, f"a shape and a dtype of {', '.join(_TENSOR_DTYPES)}", f"{shape} of {dtype}"))
    source.check_left(math.prod(shape) * kind.itemsize + _CRC.size)  # before any memory is taken for it
    tensor = torch.empty(shape, dtype=kind)
    data = tensor.view(-1).view(torch.uint8).numpy().data
    crc = bytearray(_CRC.size)
    source.readinto(data)
    source.readinto(crc)
    if _CRC.unpack(crc)[0] != zlib.crc32(data):
        raise ValueError(mismatch(where, "bytes that fit their checksum", f"a damaged file, {source.name}"))
    return tensor


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
