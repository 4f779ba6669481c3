"""The cores behind a layer: the C++ core on MLX's CPU device, Metal kernels on its GPU. Both have the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from kv4 import _core
from kv4.messages import mismatch
from kv4.recipe import Recipe

from . import gpu
from .arrays import readable, unit_stride


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
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


Span = tuple[int, int]  # a sequence's rows [first, last) of a call's arrays


class Part:
    """What a call has of an array [batch, heads, T, dim]: each sequence's `spans`, or all of it. counts: (row, tokens)
    as the core has them, None for all."""

    def __init__(self, x: mx.array, spans: Sequence[Span] | None) -> None:
        self.counts = self.at = None
        self.batch, _, self.tokens, _ = x.shape
        if spans is not None and any(span != (0, self.tokens) for span in spans):
            self.counts = [(row, hi - lo) for row, (lo, hi) in enumerate(spans) if hi > lo]
            self.at = np.concatenate([i * self.tokens + np.arange(*span) for i, span in enumerate(spans)])

    def taken(self, x: mx.array) -> mx.array:
        """[1, heads, rows of all spans, dim], or `x`."""
        if self.at is None:
            return x
        return mx.take(x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3]), mx.array(self.at), axis=2)

    def placed(self, x: np.ndarray) -> mx.array:
        """The rows that were `taken`, back in their places; 0 outside the spans."""
        if self.at is None:
            return mx.array(x)
        whole = np.zeros((x.shape[1], self.batch * self.tokens, x.shape[3]), np.float32)
        whole[:, self.at] = x[0]
        return mx.array(whole.reshape(x.shape[1], self.batch, self.tokens, -1).swapaxes(0, 1))


class Row:
    """One sequence of a core, with calls of one that has it alone. Out of date once sequences go."""

    batch = 1

    def __init__(self, core: HostCore | gpu.GpuCore, row: int) -> None:
        self._core, self._row = core, row

    @property
    def length(self) -> int:
        return self._core.lengths[self._row]

    @property
    def first(self) -> int:
        return self._core.evicted(self._row)

    def dense(self, values: bool, first: int, count: int) -> mx.array:
        return self._core.dense(values, first, count, [self._row])

    def crop(self, length: int) -> None:
        self._core.crop(length, self._row)

    def reset(self) -> None:
        self._core.reset(self._row)

    def nbytes(self) -> int:
        """Of all the core."""
        return self._core.nbytes()

    def clone(self) -> HostCore | gpu.GpuCore:
        twin = self._core.clone()
        twin.select([self._row])
        return twin

    # Of a GpuCore, whose long calls go row by row.

    mlx_prefills = True

    def attend(self, q: mx.array, **options: Any) -> mx.array:
        return self._core.attend(q, rows=[self._row], **options)

    def partial(self, q: mx.array, upto: int, scale: float) -> gpu.State:
        return self._core.partial(q, upto, scale, rows=[self._row])


class HostCore:
    """The C++ core's Cache, called with MLX's arrays, which it reads in place: each call waits for its own."""

    mlx_prefills = False  # MLX's attention on the CPU is the slower one, whatever the length

    def __init__(self, core: Any, dims: tuple[int, int, int]) -> None:
        """dims: kv_heads, head_dim_k, head_dim_v."""
        self._core, self._dims = core, dims

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._core, name)

    def append(self, keys: mx.array, values: mx.array, spans: Sequence[Span] | None = None) -> None:
        """spans: each sequence's rows of [batch, kv_heads, T, head_dim]; all by default."""
        part = Part(keys, spans)
        mx.eval(keys, values)
        k, v = part.taken(keys), part.taken(values)
        try:
            self._core.append(readable(k), readable(v), rows=part.counts)
        except ValueError as error:
            if "channel stride" not in str(error):
                raise
            self._core.append(readable(unit_stride(k)), readable(unit_stride(v)), rows=part.counts)

    def attend(self, q: mx.array, spans: Sequence[Span] | None = None, **options: Any) -> mx.array:
        """[batch, q_heads, T, head_dim_v] in q's dtype, 0 outside of the spans; the options are the core's."""
        for name in ("sinks", "mask"):
            if name in options:
                options[name] = np.array(options[name])
        part = Part(q, spans)
        x = part.taken(q)
        out = np.empty((*x.shape[:3], self._dims[2]), np.float32)
        try:
            self._core.attend(readable(x), out, rows=part.counts, **options)
        except ValueError as error:
            if "channel stride" not in str(error):
                raise
            self._core.attend(readable(unit_stride(x)), out, rows=part.counts, **options)
        return part.placed(out).astype(q.dtype)

    def dense(self, values: bool, first: int, count: int, rows: Sequence[int] | None = None) -> mx.array:
        """float32 [batch, kv_heads, count, head_dim]: positions [first, first + count), dequantised, of these sequences
        or all."""
        core = self._core if rows is None else self._alone(rows)
        out = np.empty((core.batch, self._dims[0], count, self._dims[2 if values else 1]), np.float32)
        if out.size:
            (core.dense_values if values else core.dense_keys)(first, count, out)
        return mx.array(out)

    def _alone(self, rows: Sequence[int]) -> Any:
        """A core of these sequences, which shares their pages."""
        twin = self._core.clone()
        twin.select(list(rows))
        return twin

    def evicted(self, row: int) -> int:
        """The position below which a window evicted a sequence's tokens."""
        return self._alone([row]).first

    def extend(self, other: HostCore) -> None:
        """Appends the sequences of another."""
        self._core.extend(other._core)

    def reset(self, row: int | None = None) -> None:
        """Back to empty, all of it or one sequence."""
        if row is None:
            self._core.reset()
            return
        rows = list(range(self._core.batch))
        rows[row] = len(rows)
        self._core.add(1)
        self._core.select(rows)

    def arrays(self) -> list[mx.array]:
        """MLX's arrays among what is held: none."""
        return []

    def clone(self) -> HostCore:
        return HostCore(self._core.clone(), self._dims)
