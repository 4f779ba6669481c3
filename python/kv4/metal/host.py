"""The interface to the library that holds the cache's arrays and launches its kernels: PyTorch (mps.py) or MLX
(kv4.mlx.gpu). Nothing here imports either."""

from __future__ import annotations

import platform
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv4 import _core
from kv4.messages import mismatch

ATTEND_THREADS, ROW_THREADS = _core.METAL_ATTEND_THREADS, _core.METAL_ROW_THREADS
THREADGROUP_BYTES = 32768  # what every Apple GPU has (Metal Feature Set Tables)
MACOS = (14, 0)  # Metal 3.1
HEAD_DIMS = _core.METAL_HEAD_DIMS
DTYPES = ("float32", "float16", "bfloat16")

Output = Any  # an array to write to, or (shape, dtype) of one to make


def why_not_head_dim(head_dim: int) -> str | None:
    """None where there are kernels for heads of `head_dim` channels, else the reason."""
    if head_dim in HEAD_DIMS:
        return None
    return mismatch("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))} on Metal", head_dim)


def why_not_macos() -> str | None:
    """None where macOS is new enough for the kernels' language or its version is unknown; else the reason."""
    version = platform.mac_ver()[0]
    if not version or tuple(int(x) for x in version.split(".")[:2]) >= MACOS:
        return None
    return mismatch("device", f"macOS {MACOS[0]}.{MACOS[1]} or newer (Metal 3.1)", f"macOS {version}")


class Host(ABC):
    """Arrays and kernels of one head dim on one device. Dtypes go by name: "float32", "float16", "bfloat16", "uint8".

    Arrays share what PyTorch and MLX have in common: shape, nbytes, reshape, flatten, tolist, and reading and
    assigning by index. in_place: kernels may write to an array that exists already.
    """

    head_dim: int
    cores: int  # GPU cores to fill, as far as known
    in_place: bool
    nothing: Any  # in place of buffers that are not read

    @abstractmethod
    def run(
        self, name: str, inputs: Sequence[Any], outputs: Sequence[Output], threads: Sequence[int], group: int
    ) -> list[Any]:
        """Dispatches `threads` threads of entry point `name`, `group` of them along the first axis a threadgroup, and
        returns its outputs. Inputs, then outputs, are its buffers in the order of their declaration in src/metal."""

    @abstractmethod
    def why_not_here(self, x: Any) -> str | None:
        """None where the kernels can read `x` in place, else the device that it is on."""

    @abstractmethod
    def dtype(self, x: Any) -> str:
        """The name of an array's dtype, of whatever kind."""

    @abstractmethod
    def strides(self, x: Any) -> list[int]:
        """The strides, in elements, of `x` as it is passed to the kernels."""

    @abstractmethod
    def zeros(self, shape: Sequence[int], dtype: str) -> Any: ...

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: str) -> Any: ...

    @abstractmethod
    def table(self, values: np.ndarray | Sequence[int]) -> Any:
        """An array of the same numbers; `nothing` for an empty one."""

    @abstractmethod
    def numpy(self, x: Any) -> np.ndarray:
        """The same numbers on the CPU, bfloat16 as float32. Waits for the device."""

    @abstractmethod
    def bits(self, x: Any) -> np.ndarray:
        """The bytes of `x` on the CPU, uint8 [..., bytes of the last axis]. Waits for the device."""

    @abstractmethod
    def of_bits(self, bits: np.ndarray, dtype: str) -> Any:
        """The array whose bits() these are."""

    @abstractmethod
    def copy(self, x: Any) -> Any:
        """An independent copy."""

    @abstractmethod
    def cast(self, x: Any, dtype: str) -> Any:
        """`x` on the device in `dtype`, detached from gradients."""

    @abstractmethod
    def concatenate(self, arrays: Sequence[Any], axis: int) -> Any: ...

    @abstractmethod
    def take(self, x: Any, indices: Sequence[int], axis: int) -> Any: ...

    @abstractmethod
    def where(self, chosen: np.ndarray, x: Any, y: Any) -> Any:
        """Elementwise x where `chosen`, else y; the three broadcast, and y may be a number."""

    @abstractmethod
    def put(self, x: Any, indices: Sequence[int], rows: Any) -> Any:
        """`x` with rows [len(indices), ...] in these places of its first axis; `x` itself may be changed."""

    @abstractmethod
    def finite(self, x: Any) -> Any:
        """`x` with zeros for every row of the last axis that holds NaN or infinity."""

    def energies(self, q: Any, b: int, queries: Sequence[int], kv_heads: int) -> Any:
        """float32 [len(queries), kv_heads, head_dim]: squares of q [batch, q_heads, T, head_dim], summed over the query
        heads of each KV head."""
        x = self.cast(self.take(q[b], queries, 1), "float32")
        return (x * x).reshape(kv_heads, -1, len(queries), q.shape[3]).sum(1).swapaxes(0, 1)

    def seen(self, mask: Any) -> np.ndarray:
        """bool [batch or 1, T or 1, columns] on the CPU: what any head sees by mask [batch, q_heads, T, columns] or 1
        each. Waits for the device."""
        dtype = self.dtype(mask)
        return self.numpy((mask if dtype == "bool" else mask > _core.hidden_by(dtype)).any(1))


class Matrices:
    """A rotation's matrices in the kernels' form, shared by all caches that use the rotation on one host."""

    def __init__(self, host: Host, tables: Any, values: bool) -> None:
        self.tables = tables  # keeps the rotation, which its address identifies
        self.query = host.table(tables.query_matrix(values))
        self.output = host.table(tables.output_matrix(values))
        self.sealing = host.table(tables.sealing_matrix(values))
        self.nbytes = sum(x.nbytes for x in (self.query, self.output, self.sealing) if x is not host.nothing)


class Constants:
    """A recipe's constants for the kernels: matrices, level tables, layout. Shared by layers of one shape."""

    def __init__(self, host: Host, tables: Any, matrices: Sequence[Matrices]) -> None:
        self.tables = tables
        self.matrices = tuple(matrices)  # of keys and of values
        self.query = matrices[0].query
        self.output = [x.output for x in matrices]
        self.sealing = [x.sealing for x in matrices]
        self.levels = [host.table(tables.levels(values)) for values in (False, True)]
        self.side = [host.table(tables.side(values)) for values in (False, True)]
        # Where a kernel cannot write to the pool, each side of a slice is an output of its own: keys, then values.
        self.side_alone = [host.table(tables.side_alone(values)) for values in (False, True)]
        tokens = [tables.tokens(values) for values in (False, True)]
        self.side_bytes = [len(x) for x in tokens]
        self.token_of_byte = np.concatenate(tokens)  # of a slice; -1 where a byte is no token's own

    def shared(self) -> list[tuple[int, int, bool]]:
        """(identity, bytes, on_device) of all this, as _core.Cache.shared has it."""
        tables = [*self.levels, *self.side, *self.side_alone]
        own = [(id(self), sum(x.nbytes for x in tables), True)]
        rotations = [(identity, nbytes, False) for identity, nbytes in self.tables.rotations]
        return own + [(id(x), x.nbytes, True) for x in dict.fromkeys(self.matrices)] + list(dict.fromkeys(rotations))


_lock = threading.Lock()
# Shared by the caches of this process on a host; freed with the last of them.
_matrices: weakref.WeakValueDictionary[tuple, Matrices] = weakref.WeakValueDictionary()
_constants: weakref.WeakValueDictionary[tuple, Constants] = weakref.WeakValueDictionary()


def shared_constants(host: Host, recipe: Any, *, matrix_k: Any, matrix_v: Any, **shape: Any) -> Constants:
    """The Constants of a recipe and its matrices. shape: dtype, kv_heads, head_dim_k and head_dim_v."""
    tables = _core.MetalTables(recipe, **shape, matrix_k=matrix_k, matrix_v=matrix_v)
    rotations = [identity for identity, _ in tables.rotations]
    key = (host, recipe, *sorted(shape.items()), *rotations)
    with _lock:
        found = _constants.get(key)
        if found is not None:
            return found
        sides = []
        for values, rotation in enumerate(rotations):
            matrices = _matrices.get((host, rotation))
            if matrices is None:
                matrices = _matrices[host, rotation] = Matrices(host, tables, bool(values))
            sides.append(matrices)
        made = _constants[key] = Constants(host, tables, sides)
        return made
