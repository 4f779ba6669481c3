"""Handles, which a kv4 cache passes to attention in place of dense keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx


class Holds(Protocol):
    """The interface of a handle's cache (KV4Cache, BatchKV4Cache)."""

    version: int
    dtype: mx.Dtype

    def shape_of(self, which: str) -> tuple[int, int, int, int]: ...

    def dense(self, which: str) -> mx.array: ...


class KVHandle:
    """The keys or the values of one layer as of one `update_and_fetch`: a plain object, not an array.

    kv4's attention reads the packed cache behind it. Python's operators, indexing, attributes of an array and
    mx.array(handle) dequantise to a dense array [batch, kv_heads, columns, head_dim] of the model's dtype. MLX's
    functions take no foreign objects: they raise TypeError, never compute with something else.

    A handle refers to the cache's state at its `version`; once the cache has changed, every use raises RuntimeError.
    """

    __slots__ = ("cache", "own", "version", "which")

    def __init__(self, cache: Holds, which: str, own: mx.array | None = None) -> None:
        self.cache = cache
        self.which = which
        self.version = cache.version
        # The exact array of the update itself, for the attention of a long call.
        self.own = own

    def check(self) -> None:
        """Raises RuntimeError where the cache has changed since this handle was made."""
        if self.version != self.cache.version:
            raise RuntimeError(
                f"{self.which}: expected the handle of the cache's newest state (version {self.cache.version}); got a "
                f"stale handle of version {self.version}: the cache was updated, trimmed or filtered since"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.cache.shape_of(self.which)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> mx.Dtype:
        return self.cache.dtype

    def dense(self) -> mx.array:
        """The dequantised array [batch, kv_heads, columns, head_dim]. Errors: RuntimeError where stale."""
        self.check()
        return self.cache.dense(self.which)

    def __mlx_array__(self) -> mx.array:
        return self.dense()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __repr__(self) -> str:
        return f"KVHandle({self.which}, shape={self.shape}, dtype={self.dtype}, version={self.version})"


def _forward(name: str) -> Any:
    def method(self: KVHandle, *args: Any) -> Any:
        return getattr(self.dense(), name)(*(x.dense() if isinstance(x, KVHandle) else x for x in args))

    method.__name__ = name
    return method


# Python looks special methods up on the type, past __getattr__.
_FORWARDED = ("getitem", "len", "neg", "abs", "lt", "le", "gt", "ge", "pow", "add", "radd", "sub", "rsub", "mul") + (
    ("rmul", "truediv", "rtruediv", "matmul")
)
for _name in _FORWARDED:
    setattr(KVHandle, f"__{_name}__", _forward(f"__{_name}__"))
