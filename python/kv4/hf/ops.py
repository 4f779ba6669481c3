"""The cache as torch operators, so that torch.compile keeps one graph from layer to layer.

kv4::append and kv4::attend name a layer by a number; what they do with it is what KV4Layer.update and the kv4 attention
do in eager mode, at the time the graph runs. Lengths, page tables and versions therefore never enter a graph, and it
serves a cache that grows. `state` is an empty tensor that stands for the layer's contents: append changes it and
attend reads it, which gives the compiler their order. Host code runs in both, so they are marked as unfit to be
replayed inside a CUDA graph, and torch.compile(mode="reduce-overhead") captures what lies between them.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

from .handle import Held, KVHandle

if TYPE_CHECKING:
    from .cache import KV4Layer

_layers: weakref.WeakValueDictionary[int, KV4Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS = () if _unsafe is None else (_unsafe,)


def enter(layer: KV4Layer) -> int:
    """The number under which the operators know `layer`, for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _layer(number: int) -> KV4Layer:
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError(f"layer: expected the number of a live KV4Layer; got {number}")
    return layer


class CompiledHandle(KVHandle):
    """A handle made inside a compiled graph, where nothing comes between an update and its attention. Outside of it, it
    is a handle of that update until the layer changes."""

    __slots__ = ("layer", "ticket")

    def __init__(self, layer: KV4Layer, which: str, ticket: torch.Tensor) -> None:
        self.layer = layer
        self.which = which
        self.ticket = ticket
        self.own = None
        self._dense = None

    def now(self) -> KVHandle:
        """The handle of the update. Errors: RuntimeError where the layer has changed since."""
        handles = self.layer.appended
        if handles is None or self.layer.version != int(self.ticket):
            raise RuntimeError(
                f"{self.which}: expected a layer that has not changed since the compiled update; got a stale handle"
            )
        return handles[self.which == "value"]

    @property
    def held(self) -> Held:
        return _now(self).held

    def dense(self) -> torch.Tensor:
        return _now(self).dense()


@torch.compiler.disable
def _now(handle: CompiledHandle) -> KVHandle:
    """What anything but attention asks of a handle is answered outside the graph, after the update has run."""
    return handle.now()


@torch.library.custom_op("kv4::append", mutates_args=("state",), tags=_TAGS)
def append(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    """KV4Layer.update of keys [batch, kv_heads, T, head_dim] and values alike. Returns the new version, int64 []."""
    found = _layer(layer)
    found.appended = found.update(key, value)
    return torch.tensor(found.version)


@append.register_fake
def _(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("kv4::attend", mutates_args=(), tags=_TAGS)
def attend(
    state: torch.Tensor,
    query: torch.Tensor,
    layer: int,
    head_dim_v: int,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """The kv4 attention of query [batch, q_heads, T, head_dim] over what the layer holds since its last append:
    [batch, T, q_heads, head_dim_v], contiguous, in the query's dtype."""
    from .attention import attend_packed

    found = _layer(layer)
    if found.appended is None:
        raise RuntimeError("layer: expected kv4::append before kv4::attend; got a layer that has changed since")
    key, value = found.appended
    # A long call's keys and values are not kept beyond its attention.
    found.appended = KVHandle(key.held, "key", None), KVHandle(value.held, "value", None)
    return attend_packed(query, key, value, mask, scaling, softcap, s_aux, causal, query.dtype)


@attend.register_fake
def _(state, query, layer, head_dim_v, mask, scaling, softcap, s_aux, causal):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, head_dim_v))
