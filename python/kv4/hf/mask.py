"""Masks of the kv4 attention: compact wherever the pattern is causal or open, a window, and left padding.

`kv4_mask` answers with one of
  None                  one query, which sees every column;
  Pattern               causal or not, the first visible column of each row, a window;
  int32 [batch,1,1,2]   the same in compiled graphs: causal, the first visible column and the window of each row;
  bool  [batch,1,q,kv]  anything else, True = visible.
Which of them it is says all that is visible. A mask of None that a model hands to the attention by itself means what it
means to torch: causal or open, as the module says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from kv4.messages import mismatch

_AND_MASK_CODE = sliding_window_causal_mask_function(1).__code__
# Of compiled graphs: causal, and nothing else hides a column.
CAUSAL = torch.zeros((1, 1, 1, 2), dtype=torch.int32)


class Pattern(torch.Tensor):
    """A bool mask [batch, 1, q, kv] that is known by its rule and holds no elements. The queries are the newest of the
    columns. Torch functions see the tensor it stands for, so that models may slice, flip and combine it.

    causal: no query sees a later column. start: int32 [batch] in CPU memory, the first column that a row shows, or
    None. window: a query sees that many of the newest columns; 0 = all.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    causal: bool
    start: torch.Tensor | None
    window: int

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        *,
        causal: bool = True,
        start: torch.Tensor | None = None,
        window: int = 0,
    ) -> Pattern:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.causal, self.start, self.window = causal, start, window
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Pattern:
        return Pattern(self.shape, self.device, causal=self.causal, start=self.start, window=self.window)

    def dense(self) -> torch.Tensor:
        batch, _, q_length, kv_length = self.shape
        windows = torch.full((1,), self.window, dtype=torch.int32) if self.window else None
        keep = expand(self.start, windows, q_length, kv_length, self.device, self.causal)
        return keep.expand(batch, 1, q_length, kv_length)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moved = func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None
        if moved and kwargs.get("dtype") in (None, torch.bool):
            # Called by hooks that move a layer's arguments to its device.
            mask = args[0]
            return Pattern(mask.shape, kwargs["device"], causal=mask.causal, start=mask.start, window=mask.window)
        args, kwargs = pytree.tree_map_only(Pattern, Pattern.dense, (args, kwargs))
        return func(*args, **kwargs)


def rule_of(mask_function: Callable) -> tuple[bool, int] | None:
    """(causal, window) of the plain causal pattern, of the plain sliding window and of the open pattern; None for any
    other one, and in a compiled graph for windows."""
    if mask_function is causal_mask_function:
        return True, 0
    if mask_function is bidirectional_mask_function:
        return False, 0
    if torch.compiler.is_dynamo_compiling() or getattr(mask_function, "__code__", None) is not _AND_MASK_CODE:
        return None  # closures are opaque to the compiler
    parts = mask_function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    if not parts[0].__qualname__.startswith("sliding_window_overlay."):
        return None
    window = parts[0].__closure__[0].cell_contents
    return (True, window) if isinstance(window, int) and window > 0 else None


def kv4_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of one forward pass; see the module. Arguments are those of transformers' mask functions:
    `attention_mask` is None or [batch, positions], nonzero = a real token."""
    rule = rule_of(mask_function)
    if rule is not None and not torch.compiler.is_exporting():
        causal, window = rule
        newest = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        compact = newest and allow_is_causal_skip if causal else allow_is_bidirectional_skip
        start = True
        if compact and attention_mask is not None:
            start = leading_padding(attention_mask, kv_length, kv_offset)
        if compact and start is not None:
            start = None if start is True else start
            window = window if kv_length > window else 0
            if q_length == 1 and start is None and not window:
                return None
            if not torch.compiler.is_dynamo_compiling():
                shape = (batch_size, 1, q_length, kv_length)
                return Pattern(shape, device, causal=causal, start=start, window=window)
            if causal:
                return CAUSAL if start is None else row_mask(batch_size, start, 0)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **kwargs,
    )


@torch.compiler.disable
def leading_padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor | bool | None:
    """int32 [batch]: hidden columns at the start of each row. True where no row has any; None where a hidden column
    follows a visible one. What a mask holds decides the program: a compiled graph is left here, once per mask."""
    if attention_mask.shape[1] < kv_offset + kv_length:
        return None  # columns beyond the mask are hidden
    visible = attention_mask[:, kv_offset : kv_offset + kv_length]
    if visible.dtype != torch.bool:
        visible = visible != 0
    if bool(visible.all()):
        return True
    start = kv_length - visible.sum(-1)
    columns = torch.arange(kv_length, device=visible.device)
    leading = (visible == (columns >= start[:, None])).all()
    *start, leading = torch.cat([start, leading[None]]).tolist()  # one device synchronisation, not two
    return torch.tensor(start, dtype=torch.int32) if leading else None


def row_mask(batch: int, start: torch.Tensor | None, window: int) -> torch.Tensor:
    """The int32 mask of rows that start at `start`, in CPU memory wherever the model is: the core reads it there.
    Columns count from the first one that the layer still holds; from position 0 where the mask's attribute
    `kv4_positions` is True."""
    mask = torch.empty((batch, 1, 1, 2), dtype=torch.int32)
    mask[..., 0] = 0 if start is None else start[:, None, None]
    mask[..., 1] = window
    return mask


def limits_of(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(start, window, shared) of a Pattern or an int32 mask: contiguous int32 tensors [batch] in CPU memory, None where
    they hide nothing, and the window of every row where all have the same one, else 0. Every layer of a forward pass
    gets the same mask object, so the answer is kept on it. Errors: ValueError for another shape of an int32 mask."""
    limits = mask.__dict__.get("_kv4_limits")
    if limits is None:
        if type(mask) is Pattern:
            shared = mask.window
            window = torch.full(mask.shape[:1], shared, dtype=torch.int32) if shared else None
            limits = (mask.start, window, shared)
        else:
            limits = _row_limits(mask)
        mask._kv4_limits = limits
    return limits


def _row_limits(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if mask.dim() != 4 or tuple(mask.shape[1:]) != (1, 1, 2):
        raise ValueError(mismatch("attention_mask", "int32 [batch, 1, 1, 2] (start, window)", mask))
    columns = mask.detach().cpu().reshape(-1, 2).unbind(1)
    start, window = (x.contiguous() if bool(x.any()) else None for x in columns)
    shared = int(window[0]) if window is not None and bool((window == window[0]).all()) else 0
    return start, window, shared


def on_host(mask: torch.Tensor) -> torch.Tensor | None:
    """A general mask in CPU memory, for the core's own notes on what no query saw; kept on the mask, since every layer
    of a forward pass gets the same object. None while a CUDA graph is captured, which must not wait for the device."""
    if not mask.is_cuda:
        return mask
    host = mask.__dict__.get("_kv4_host")
    if host is None and not torch.cuda.is_current_stream_capturing():
        host = mask._kv4_host = mask.detach().cpu()
    return host


def expand(
    start: torch.Tensor | None,
    window: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    device: torch.device,
    causal: bool = True,
) -> torch.Tensor:
    """bool [batch or 1, 1, q, kv] of a pattern with limits, for kernels that want a dense mask."""
    row = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    column = torch.arange(kv_length, device=device)[None]
    keep = (column <= row if causal else column >= row - kv_length)[None, None]
    if start is not None:
        keep = keep & (column >= start.to(device).view(-1, 1, 1, 1))
    if window is not None:
        limit = window.to(device).view(-1, 1, 1, 1)
        keep = keep & ((limit == 0) | (column > row - limit))
    return keep
