"""Masks of the kv4 attention: compact wherever the pattern is causal, a window, and left padding.

`kv4_mask` answers with one of
  None                  plain lower-right causal, nothing else hides a column;
  int32 [batch,1,1,2]   causal, and per row the first visible column and the window (0 = none);
  bool  [batch,1,q,kv]  anything else, True = visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

_AND_MASK_CODE = sliding_window_causal_mask_function(1).__code__


def window_of(mask_function: Callable) -> int | None:
    """0 for the plain causal pattern, W for the plain sliding window, None for any other pattern, and in a compiled
    graph for all but the causal one."""
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_dynamo_compiling() or getattr(mask_function, "__code__", None) is not _AND_MASK_CODE:
        return None  # the compiler does not show what a function closes over
    parts = mask_function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    if not parts[0].__qualname__.startswith("sliding_window_overlay."):
        return None
    window = parts[0].__closure__[0].cell_contents
    return window if isinstance(window, int) and window > 0 else None


def kv4_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of one forward pass; see the module. Arguments are those of transformers' mask functions:
    `attention_mask` is None or [batch, positions], nonzero = a real token."""
    window = window_of(mask_function)
    compact = (
        window is not None
        and allow_is_causal_skip
        and kv_length > 1
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length  # queries are the newest columns
        and not torch.compiler.is_exporting()
    )
    if compact:
        if window and kv_length <= window:
            window = 0
        if attention_mask is None:
            return row_mask(batch_size, None, window) if window else None
        start = leading_padding(attention_mask, kv_length, kv_offset)
        if start is True:
            return row_mask(batch_size, None, window) if window else None
        if start is not None:
            return row_mask(batch_size, start, window)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


@torch.compiler.disable
def leading_padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor | bool | None:
    """int64 [batch]: hidden columns at the start of each row. True where no row has any; None where a hidden column
    follows a visible one. What a mask holds decides the program: a compiled graph is left here, once per mask."""
    if attention_mask.shape[1] < kv_offset + kv_length:
        return None  # columns beyond the mask are hidden, at the end
    visible = attention_mask[:, kv_offset : kv_offset + kv_length]
    if visible.dtype != torch.bool:
        visible = visible != 0
    if bool(visible.all()):
        return True
    start = kv_length - visible.sum(-1)
    columns = torch.arange(kv_length, device=visible.device)
    leading = (visible == (columns >= start[:, None])).all()
    *start, leading = torch.cat([start, leading[None]]).tolist()  # one wait for the device, not two
    return torch.tensor(start) if leading else None


def row_mask(batch: int, start: torch.Tensor | None, window: int) -> torch.Tensor:
    """The int32 mask of rows that start at `start`, in CPU memory wherever the model is: the core reads it there.
    Columns count from the first one that the layer still holds; from position 0 where the mask's attribute
    `kv4_positions` is True."""
    mask = torch.empty((batch, 1, 1, 2), dtype=torch.int32)
    mask[..., 0] = 0 if start is None else start[:, None, None]
    mask[..., 1] = window
    return mask


def row_limits(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(start, window, shared) of an int32 mask [batch, 1, 1, 2]: contiguous int32 tensors [batch] in CPU memory, None
    where they hide nothing, and the window of every row where all have the same one, else 0. Every layer of a forward
    pass gets the same mask object, so the answer is kept on it. Errors: ValueError for any other shape."""
    limits = mask.__dict__.get("_kv4_limits")
    if limits is None:
        if mask.dim() != 4 or tuple(mask.shape[1:]) != (1, 1, 2):
            raise ValueError(f"attention_mask: expected int32 [batch, 1, 1, 2] (start, window); got {list(mask.shape)}")
        columns = mask.detach().cpu().reshape(-1, 2).unbind(1)
        start, window = (x.contiguous() if bool(x.any()) else None for x in columns)
        shared = int(window[0]) if window is not None and bool((window == window[0]).all()) else 0
        limits = (start, window, shared)
        mask._kv4_limits = limits
    return limits


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
) -> torch.Tensor:
    """bool [batch or 1, 1, q, kv] of a causal pattern with limits, for kernels that want a dense mask."""
    row = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    column = torch.arange(kv_length, device=device)[None]
    keep = (column <= row)[None, None]
    if start is not None:
        keep = keep & (column >= start.to(device).view(-1, 1, 1, 1))
    if window is not None:
        limit = window.to(device).view(-1, 1, 1, 1)
        keep = keep & ((limit == 0) | (column > row - limit))
    return keep
