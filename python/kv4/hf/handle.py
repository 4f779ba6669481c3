"""What a kv4 cache layer hands to attention instead of dense keys and values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .cache import KV4Layer

_FALLBACK_WARNING = (
    "kv4: this model reads a KV4Cache without the kv4 attention; without the kv4 attention the same cache still gives "
    "right answers (dequantising), but slower and with dense copies. Use kv4.hf.attach(model) or "
    'model.set_attn_implementation("kv4") where the model allows it.'
)
_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(_FALLBACK_WARNING, UserWarning, stacklevel=4)


class KVHandle:
    """The keys or the values of one layer as of one `update`: a plain object, not a tensor.

    The kv4 attention reads the packed cache behind it. Any other use (a torch function, a tensor method, indexing,
    arithmetic) dequantises to a dense tensor [batch, kv_heads, columns, head_dim] of the model's dtype, so models
    that know nothing of kv4 get right answers. Column j is the token at position `offset` + j.

    A handle speaks for the layer's state at its `version`. Once the cache has moved on (another update, crop,
    reorder, reset, ...) every use raises RuntimeError.
    """

    __slots__ = ("_dense", "columns", "layer", "length", "own", "version", "which")

    def __init__(
        self, layer: KV4Layer, which: str, version: int, length: int, columns: int, own: torch.Tensor | None
    ) -> None:
        self.layer = layer
        self.which = which
        self.version = version
        self.length = length
        self.columns = columns
        # The exact tensor of the update itself, where the update was long enough for a prefill kernel to want it.
        self.own = own
        self._dense: torch.Tensor | None = None

    def check(self) -> None:
        """Raises RuntimeError where the cache has changed since this handle was made."""
        if self.version != self.layer.version:
            raise RuntimeError(
                f"{self.which}: expected the handle of the layer's newest state (version {self.layer.version}); got a "
                f"stale handle of version {self.version}: the cache was updated, cropped, reordered or reset since"
            )

    @property
    def offset(self) -> int:
        """Position of column 0."""
        return self.length - self.columns

    @property
    def shape(self) -> torch.Size:
        layer = self.layer
        dim = layer.head_dim_k if self.which == "key" else layer.head_dim_v
        return torch.Size((layer.batch, layer.kv_heads, self.columns, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def ndim(self) -> int:
        return 4

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def is_cpu(self) -> bool:
        return self.layer.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.layer.on_device

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def contiguous(self) -> KVHandle:
        return self

    def to(self, *args: Any, **kwargs: Any) -> KVHandle | torch.Tensor:
        """Itself where nothing would change, else a dense tensor."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if (device is None or _same_device(torch.device(device), self.device)) and dtype in (None, self.dtype):
            return self
        return self.dense().to(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        """The dequantised tensor [batch, kv_heads, columns, head_dim]. Errors: RuntimeError where stale."""
        self.check()
        if self._dense is None:
            _warn_once()
            self._dense = self.layer.dense(self.which, self.offset, self.columns)
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(
            lambda x: x.dense() if isinstance(x, KVHandle) else x, (args, kwargs or {}), is_leaf=_is_handle
        )
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __repr__(self) -> str:
        return f"KVHandle({self.which}, shape={tuple(self.shape)}, dtype={self.dtype}, version={self.version})"


def _same_device(wanted: torch.device, have: torch.device) -> bool:
    return wanted.type == have.type and wanted.index in (None, have.index)


def _is_handle(x: Any) -> bool:
    return isinstance(x, KVHandle)


def _forward(name: str) -> Any:
    def method(self: KVHandle, *args: Any) -> Any:
        return getattr(self.dense(), name)(*args)

    method.__name__ = name
    return method


# Python looks special methods up on the type, past __getattr__. Identity and truth stay those of a plain object.
_FORWARDED = (
    ("getitem", "len", "neg", "abs", "lt", "le", "gt", "ge", "pow", "add", "radd", "sub", "rsub", "mul", "rmul")
    + ("truediv", "rtruediv", "matmul", "rmatmul")
)  # fmt: skip
for _name in _FORWARDED:
    setattr(KVHandle, f"__{_name}__", _forward(f"__{_name}__"))
