"""The cache on MLX's GPU: MLX's arrays, the kernels of src/metal through `mlx.fast.metal_kernel`.

MLX compiles a kernel's body and generates its signature from the arrays of a call. Its restrictions, and how they are
met: inputs of fewer than 8 elements are put in the constant address space, so they are padded; every combination of
dtypes compiles another kernel, so inputs are passed as bytes; inputs are read-only and outputs are new arrays, so a
sealed page is an output that is then copied into the pool; inputs are made contiguous. It compiles without fast math,
as sealing needs. Only what `kv4.metal` waits for is waited for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from kv4.messages import mismatch
from kv4.metal import source
from kv4.metal.cache import Cache
from kv4.metal.host import Host, Output, why_not_head_dim, why_not_macos

from .prefill import State

_SMALLEST = 8  # elements that make an input of MLX's a `device` one
_INSTANCE = re.compile(r"(\w+)_d(\d+)_r(\d+)")
# GPU cores to fill, by the last letter of MLX's name of the architecture, as MLX reads it: phones; M and M Pro; M Max;
# M Ultra. The largest of each kind: a few threadgroups too many cost less than idle cores.
_CORES = {"p": 6, "g": 20, "s": 40, "d": 80}


class MlxHost(Host):
    """Kernels of one head dim. metal_kernel: mlx.fast.metal_kernel, or what stands in for it in tests.

    Errors: NotImplementedError for a head dim without kernels, before anything is allocated.
    """

    in_place = False

    def __init__(self, head_dim: int, metal_kernel: Callable[..., Any] = mx.fast.metal_kernel, cores: int = 8) -> None:
        reason = why_not_head_dim(head_dim)
        if reason is not None:
            raise NotImplementedError(reason)
        self.head_dim, self.cores = head_dim, cores
        self.metal_kernel = metal_kernel
        self.kernels: dict[str, Any] = {}
        self.nothing = mx.zeros(16, mx.uint8)

    def run(
        self, name: str, inputs: Sequence[Any], outputs: Sequence[Output], threads: Sequence[int], group: int
    ) -> list[mx.array]:
        instance = _INSTANCE.fullmatch(name)
        entry = source.entries()[instance.group(1) if instance else name]
        values = [int(x) for x in instance.groups()[1:]] if instance else []
        kernel = self.kernels.get(entry.name)
        if kernel is None:
            kernel = self.kernels[entry.name] = self.metal_kernel(
                name=entry.name,
                input_names=list(entry.inputs),
                output_names=list(entry.outputs),
                source=entry.source,
                header=entry.header,
            )
        return kernel(
            inputs=[_bytes(x) for x in inputs],
            template=list(zip(entry.template, values, strict=True)),
            grid=tuple(int(n) for n in threads),
            threadgroup=(group, 1, 1),
            output_shapes=[tuple(int(n) for n in shape) for shape, _ in outputs],
            output_dtypes=[getattr(mx, dtype) for _, dtype in outputs],
        )

    def why_not_here(self, x: mx.array) -> str | None:
        return None

    def dtype(self, x: mx.array) -> str:
        return str(x.dtype).rsplit(".", 1)[-1].rstrip("_")

    def strides(self, x: mx.array) -> list[int]:
        return [int(np.prod(x.shape[i + 1 :])) for i in range(x.ndim)]

    def zeros(self, shape: Sequence[int], dtype: str) -> mx.array:
        return mx.zeros(tuple(shape), getattr(mx, dtype))

    def empty(self, shape: Sequence[int], dtype: str) -> mx.array:
        return self.zeros(shape, dtype)

    def table(self, values: Any) -> mx.array:
        values = np.ascontiguousarray(values)
        return mx.array(values) if values.size else self.nothing

    def numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def bits(self, x: mx.array) -> np.ndarray:
        return np.array(mx.contiguous(x).view(mx.uint8))

    def of_bits(self, bits: np.ndarray, dtype: str) -> mx.array:
        return mx.array(bits).view(getattr(mx, dtype))

    def copy(self, x: mx.array) -> mx.array:
        return mx.array(x)

    def cast(self, x: mx.array, dtype: str) -> mx.array:
        return x.astype(getattr(mx, dtype))

    def concatenate(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.concatenate(list(arrays), axis=axis)

    def take(self, x: mx.array, indices: Sequence[int], axis: int) -> mx.array:
        return mx.take(x, mx.array(list(indices)), axis=axis)

    def where(self, chosen: np.ndarray, x: mx.array, y: Any) -> mx.array:
        return mx.where(mx.array(chosen), x, y)

    def put(self, x: mx.array, indices: Sequence[int], rows: mx.array) -> mx.array:
        twin = mx.array(x)
        twin[mx.array(list(indices))] = rows
        return twin

    def finite(self, x: mx.array) -> mx.array:
        return mx.where(mx.isfinite(x).all(-1, keepdims=True), x, mx.zeros((), x.dtype))


def _bytes(x: mx.array) -> mx.array:
    """The same memory as uint8, at least _SMALLEST of them."""
    x = x.view(mx.uint8)
    if x.size >= _SMALLEST:
        return x
    return mx.concatenate([x.reshape(-1), mx.zeros(_SMALLEST - x.size, mx.uint8)])


class GpuCore(Cache):
    """`Cache` with the calls of HostCore (core.py)."""

    mlx_prefills = True  # fused, over a long call's own tokens

    def attend(self, q: mx.array, **options: Any) -> mx.array:
        return self.attended(q, dtype=self.host.dtype(q), **options)

    def partial(self, q: mx.array, upto: int, scale: float, **options: Any) -> State:
        state = self.attended(q, upto=upto, scale=scale, **options)
        return State(state[..., : self.dim], state[..., self.dim], state[..., self.dim + 1])

    def evicted(self, row: int) -> int:
        return self.sequences[row].extent.evicted


def why_not() -> str | None:
    """None where MLX's GPU is one that the kernels run on, else the reason."""
    if not mx.metal.is_available():
        return mismatch("device", "a Metal device, or mx.set_default_device(mx.cpu)", "MLX's GPU without Metal")
    return why_not_macos()


@functools.cache
def gpu_host(head_dim: int) -> MlxHost:
    """The host of MLX's GPU. Errors: RuntimeError with the reason where it is none of Metal's; MlxHost's."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    information = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return MlxHost(head_dim, cores=_CORES.get(str(information.get("architecture", ""))[-1:], 8))
