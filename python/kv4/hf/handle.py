"""Handles, which a kv4 cache layer passes to attention instead of dense keys and values."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .device import on_stream

_FALLBACK_WARNING = (
    "kv4: this model reads a KV4Cache without the kv4 attention; without the kv4 attention the same cache still gives "
    "right answers (dequantising), but slower and with dense copies. Use kv4.hf.attach(model) or "
    'model.set_attn_implementation("kv4") where the model allows it.'
)
_warned = False
_CPU = torch.device("cpu")


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(_FALLBACK_WARNING, UserWarning, stacklevel=4)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """What stays the same for as long as a layer has one core."""

    dtype: torch.dtype | None = None  # of exact rows and of dense tensors
    device: torch.device = _CPU
    on_device: bool = False  # of CUDA
    kv_heads: int = 0
    head_dim_k: int = 0
    head_dim_v: int = 0
    sliding_window: int = 0  # tokens that the core holds at least and shows by itself; 0 = all
    attends_exact_call: bool = False  # a long call may see its own tokens exactly
    records_queries: bool = False


class _Never:
    """The core of a step that was only captured: every use raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("handle: expected one of a step that ran; got one of a step captured for a CUDA graph")


NEVER = _Never()


class Held:
    """What a layer holds as of one `update`. The core is the layer's own until the layer is about to change; then,
    where a handle still speaks for this state, it is a clone, which shares pages and rows with the layer's."""

    __slots__ = ("__weakref__", "batch", "columns", "core", "form", "length")

    def __init__(self, core: Any, form: Form, batch: int, length: int, columns: int) -> None:
        self.core = core
        self.form = form
        self.batch = batch
        self.length = length  # tokens of each sequence
        self.columns = columns  # the newest of them, which the update's handles have

    def shape(self, which: str, count: int) -> torch.Size:
        """Of `count` positions of the "key" or "value" side."""
        form = self.form
        return torch.Size((self.batch, form.kv_heads, count, form.head_dim_k if which == "key" else form.head_dim_v))

    def dense(self, which: str, first: int, count: int) -> torch.Tensor:
        """Positions [first, first + count) of the "key" or "value" side, dequantised: [batch, kv_heads, count, dim].
        Errors: IndexError for positions that are not held."""
        if torch.compiler.is_dynamo_compiling():
            return _dense_uncompiled(self, which, first, count)
        form = self.form
        out = torch.empty(self.shape(which, count), dtype=form.dtype, device=form.device)
        if count:
            on_stream(self.core, form.device)
            (self.core.dense_keys if which == "key" else self.core.dense_values)(first, count, out)
        return out


@torch.compiler.disable
def _dense_uncompiled(held: Held, *args: Any) -> torch.Tensor:
    return held.dense(*args)


class KVHandle:
    """The keys or the values of one layer as of one `update`: a plain object, not a tensor.

    The kv4 attention reads the packed cache behind it. Any other use (a torch function, a tensor method, indexing,
    arithmetic, pickling) dequantises to a dense tensor [batch, kv_heads, columns, head_dim] of the layer's dtype, so
    models without kv4 support get correct results. Column j is the token at position `offset` + j.

    A handle keeps its values when the cache changes: if the cache is updated, cropped, reordered or reset while a
    handle is alive, the handle keeps a clone of it.
    """

    __slots__ = ("_dense", "held", "own", "which")

    def __init__(self, held: Held, which: str, own: torch.Tensor | None) -> None:
        self.held = held
        self.which = which
        # The exact tensor of the update itself, where the update was long enough for a prefill kernel to want it.
        self.own = own
        self._dense: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of each sequence, this update's included."""
        return self.held.length

    @property
    def columns(self) -> int:
        return self.held.columns

    @property
    def offset(self) -> int:
        """Position of column 0."""
        return self.length - self.columns

    @property
    def shape(self) -> torch.Size:
        return self.held.shape(self.which, self.held.columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.held.form.dtype

    @property
    def device(self) -> torch.device:
        return self.held.form.device

    @property
    def ndim(self) -> int:
        return 4

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

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
        """The dequantised tensor [batch, kv_heads, columns, head_dim]."""
        if self._dense is None:
            _warn_once()
            self._dense = self.held.dense(self.which, self.offset, self.columns)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"KVHandle({self.which}, shape={tuple(self.shape)}, dtype={self.dtype}, offset={self.offset})"


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
