"""Converts MLX arrays for the core, and errors to their common form."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
_DLPACK_CPU = 1


class _BFloat16:
    """Names the dtype to the core, which knows torch's by name; numpy has no bfloat16."""

    def __str__(self) -> str:
        return "torch.bfloat16"


_BFLOAT16 = _BFloat16()


class BFloat16View:
    """The bfloat16 numbers behind a uint16 array, in the form of a torch tensor as far as the core looks."""

    is_cpu = True
    dtype = _BFLOAT16

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits
        self.shape = bits.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // 2 for s in self.bits.strides)

    def data_ptr(self) -> int:
        return self.bits.ctypes.data


def readable(x: mx.array) -> Any:
    """`x`, evaluated, as an object that the core reads without a copy: the array itself where MLX exports CPU memory,
    else (an MLX with Metal exports its unified memory under Metal's name) a view of its bytes."""
    mx.eval(x)
    if x.__dlpack_device__()[0] == _DLPACK_CPU:
        return x
    return byte_view(x)


def byte_view(x: mx.array) -> np.ndarray | BFloat16View:
    """A view of evaluated `x` through the buffer protocol."""
    if x.dtype == mx.bfloat16:
        bits = x.view(mx.uint16)
        mx.eval(bits)
        return BFloat16View(np.asarray(bits))
    return np.asarray(x)


def unit_stride(x: mx.array) -> mx.array:
    """`x` in row order: for the rare array whose channels do not follow each other in memory."""
    return mx.contiguous(x)
