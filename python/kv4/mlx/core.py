"""What holds a layer's keys and values: the C++ core on MLX's CPU, kernels on its GPU. Both have the same calls."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from kv4 import _core
from kv4.messages import mismatch
from kv4.recipe import Recipe

from . import gpu
from .arrays import readable, unit_stride
from .prefill import State


def on_gpu() -> bool:
    """Whether MLX computes on a GPU where nothing else is said."""
    return mx.default_device() == mx.gpu


def why_not(recipe: Recipe, head_dim: int) -> str | None:
    """None where the recipe and a head dim are served on MLX's default device, else the reason."""
    try:
        _core.validate(recipe, head_dim, head_dim)
        if on_gpu():
            reason = gpu.why_not() or gpu.why_not_head_dim(head_dim)
            if reason is not None:
                return reason
            _core.MetalTables(recipe, dtype="float32", kv_heads=1, head_dim_k=head_dim, head_dim_v=head_dim)
    except (ValueError, NotImplementedError) as error:
        return mismatch("recipe", f"one that serves head dim {head_dim}", error)
    return None


def new_core(recipe: Recipe, **arguments: Any) -> HostCore | gpu.GpuCore:
    """A cache on MLX's default device; the arguments are those of kv4._core.Cache. Errors: RuntimeError where that is
    a GPU without Metal; NotImplementedError or ValueError with the reason where the recipe does not serve the head
    dims there."""
    if on_gpu():
        return gpu.GpuCore(gpu.gpu_host(arguments["head_dim_k"]), recipe, **arguments)
    dims = (arguments["kv_heads"], arguments["head_dim_k"], arguments["head_dim_v"])
    return HostCore(_core.Cache(recipe, **arguments), dims)


class HostCore:
    """The C++ core's Cache, called with MLX's arrays, which it reads in place: each call waits for its own."""

    tells_non_finite = True

    def __init__(self, core: Any, dims: tuple[int, int, int]) -> None:
        """dims: kv_heads, head_dim_k, head_dim_v."""
        self._core, self._dims = core, dims

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._core, name)

    def append(self, keys: mx.array, values: mx.array) -> None:
        mx.eval(keys, values)
        try:
            self._core.append(readable(keys), readable(values))
        except ValueError as error:
            if "channel stride" not in str(error):
                raise
            self._core.append(readable(unit_stride(keys)), readable(unit_stride(values)))

    def attend(self, q: mx.array, **options: Any) -> mx.array:
        """[batch, q_heads, T, head_dim_v] in q's dtype; the options are the core's."""
        for name in ("sinks", "mask"):
            if name in options:
                options[name] = np.array(options[name])
        out = np.empty((*q.shape[:3], self._dims[2]), np.float32)
        try:
            self._core.attend(readable(q), out, **options)
        except ValueError as error:
            if "channel stride" not in str(error):
                raise
            self._core.attend(readable(unit_stride(q)), out, **options)
        return mx.array(out).astype(q.dtype)

    def partial(self, q: mx.array, upto: int, scale: float) -> State:
        """The state over positions below upto."""
        o = np.empty((*q.shape[:3], self._dims[2]), np.float32)
        m, total = np.empty(q.shape[:3], np.float32), np.empty(q.shape[:3], np.float32)
        self._core.attend_partial(readable(mx.contiguous(q)), o, m, total, upto=upto, scale=scale)
        return State(mx.array(o), mx.array(m), mx.array(total))

    def dense(self, values: bool, first: int, count: int) -> mx.array:
        """float32 [batch, kv_heads, count, head_dim]: positions [first, first + count), dequantised."""
        out = np.empty((self._core.batch, self._dims[0], count, self._dims[2 if values else 1]), np.float32)
        if out.size:
            (self._core.dense_values if values else self._core.dense_keys)(first, count, out)
        return mx.array(out)

    def arrays(self) -> list[mx.array]:
        """MLX's arrays among what is held: none."""
        return []

    def clone(self) -> HostCore:
        return HostCore(self._core.clone(), self._dims)
