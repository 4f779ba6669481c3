"""Layers that hold a state of linear attention or of a convolution beside keys and values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .layer import KV4Layer


class KV4HybridLayer(KV4Layer):
    """One layer's keys and values in the kv4 core, and beside them the state of its linear attention or convolution:
    what transformers' caches ask of a linear layer is answered by `states`, a layer of transformers' own; what concerns
    both goes to both, to `states` first, which may refuse."""

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.states = LinearAttentionLayer(number_of_states=number_of_states)

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        return self.states.update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        return self.states.update_recurrent_state(recurrent_states, state_idx, **kwargs)

    @property
    def is_croppable(self) -> bool:
        return self.states.is_croppable

    def activate_past_recording(self) -> None:
        self.states.activate_past_recording()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        self.states.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.states.reorder_cache(torch.tensor(rows, dtype=torch.long))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch).repeat_interleave(int(repeats))
        super().batch_repeat_interleave(repeats)
        self.states.reorder_cache(rows)

    def reset(self) -> None:
        super().reset()
        self.states.reset()

    def nbytes(self) -> int:
        return super().nbytes() + tensor_bytes(vars(self.states), set())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin.states = copy.deepcopy(self.states, memo)
        return twin


def _of_states(name: str) -> property:
    return property(lambda self: getattr(self.states, name))


for _name in (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
    "number_of_states",
):
    setattr(KV4HybridLayer, _name, _of_states(_name))

# Not a base class: its methods would stand before the attention layer's.
LinearAttentionCacheLayerMixin.register(KV4HybridLayer)


def own_part(layer: Any) -> Any:
    """What of a cache's layer is transformers' own: all of it, the state beside packed keys and values, or None."""
    return getattr(layer, "states", None) if isinstance(layer, KV4Layer) else layer


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of every distinct tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        if id(value) in seen:
            return 0
        seen.add(id(value))
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item, seen) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item, seen) for item in value)
    return 0
