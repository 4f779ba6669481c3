"""The cache as torch operators, so that torch.compile keeps one graph from layer to layer.

kv4::append and kv4::attend (attention.py) name a layer by a number; what they do with it is what KV4Layer.update and
the kv4 attention do in eager mode, at the time the graph runs. Lengths, page tables and versions therefore never enter
a graph, and it serves a growing cache. `state` is an empty tensor that represents the layer's contents: append mutates
it and attend reads it, which gives the compiler their order. Both run host code, so they are marked as unsafe for CUDA
graphs, and torch.compile(mode="reduce-overhead") captures the parts between them.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from .handle import Form, Held, KVHandle


class Layer(Protocol):
    """What the operators ask of a cache layer (KV4Layer)."""

    number: int
    state: torch.Tensor
    form: Form
    version: int
    appended: tuple[KVHandle, KVHandle] | None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Any: ...


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
TAGS = () if _unsafe is None else (_unsafe,)


def enter(layer: Layer) -> int:
    """The number under which the operators know `layer`, for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _layer(number: int) -> Layer:
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError(f"layer: expected the number of a live KV4Layer; got {number}")
    return layer


class CompiledHandle(KVHandle):
    """A handle made inside a compiled graph, where nothing comes between an update and its attention. Outside of it, it
    is a handle of that update until the layer changes."""

    __slots__ = ("layer", "ticket")

    def __init__(self, layer: Layer, which: str, ticket: torch.Tensor) -> None:
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


@torch.library.custom_op("kv4::append", mutates_args=("state",), tags=TAGS)
def append(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    """KV4Layer.update of keys [batch, kv_heads, T, head_dim] and values alike. Returns the new version, int64 []."""
    found = _layer(layer)
    found.appended = found.update(key, value)
    return torch.tensor(found.version)


@append.register_fake
def _(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


def take_appended(number: int) -> tuple[KVHandle, KVHandle]:
    """The handles of the newest kv4::append of a layer. A long call's keys and values, which they hold, are not kept
    beyond its attention."""
    layer = _layer(number)
    if layer.appended is None:
        raise RuntimeError("layer: expected kv4::append before kv4::attend; got a layer that has changed since")
    key, value = layer.appended
    layer.appended = KVHandle(key.held, "key", None), KVHandle(value.held, "value", None)
    return key, value
