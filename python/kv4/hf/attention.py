"""The attention function behind attn_implementation="kv4"."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kv4.messages import mismatch

from .device import on_stream, readable
from .gradient import without_gradient
from .handle import Held, KVHandle
from .mask import CAUSAL, Pattern, expand, limits_of, on_host
from .ops import TAGS, CompiledHandle, take_appended
from .prefill import prefill, supports_prefill

_HANDLES = (KVHandle, CompiledHandle)
# Whether autocast is on for any device: faster than asking for the query's device.
_autocasts = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def kv4_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: KVHandle | torch.Tensor,
    value: KVHandle | torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [batch, q_heads, T, head_dim] over a KV4Cache's handles, or over dense keys and values
    [batch, kv_heads, columns, head_dim] (no cache, cross-attention, another cache); q_heads a multiple of kv_heads.

    attention_mask: what kv4_mask answers with; bool (True = visible) or float (added to the scores) [batch or 1,
    q_heads or 1, T or 1, columns]; None: causal with the queries as the newest columns, or every column where
    `is_causal`, else the module's, is False. A row that sees nothing is 0. What a model says of windows beside its mask
    does not count, as in torch's own attention.
    scaling: multiplies q.k; None means head_dim ** -0.5. softcap: c * tanh(score / c), before the mask.
    s_aux: [q_heads] sink logits.

    Returns (output [batch, T, q_heads, head_dim_v], contiguous, None), in the query's dtype; under torch.autocast in
    its dtype, as torch's own attention. Errors: RuntimeError where gradients are wanted (at the latest in the backward
    pass); ValueError naming the argument for shapes that do not fit, or NaN or infinity that a query would see. May be
    called again on one handle, and on handles of a cache that has gone on.
    """
    if type(key) is KVHandle and query.dim() == 4 and query.shape[2] > key.length:
        # The core attends with the newest tokens that it holds.
        key, value = _dequantised(key), _dequantised(value)
    if type(key) in _HANDLES and type(value) in _HANDLES and kwargs.get("position_bias") is None:
        if module.training and query.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "query: expected inference (model.eval() or torch.no_grad()); got a model in training: no gradient "
                "passes through a KV4Cache"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if type(key) is CompiledHandle and type(value) is CompiledHandle:
            if torch.compiler.is_dynamo_compiling():
                layer, mask = key.layer, attention_mask
                if mask is CAUSAL:
                    mask, causal = None, True
                dim = layer.form.head_dim_v
                out = attend(layer.state, query, layer.number, dim, mask, scaling, softcap, s_aux, causal)
                return out.to(_output_dtype(query)), None
            key, value = key.now(), value.now()
        compiling = torch.compiler.is_dynamo_compiling()
        packed = _attend_uncompiled if compiling else attend_packed
        dtype = _output_dtype(query) if compiling or _autocasts() else query.dtype
        out = packed(query, key, value, attention_mask, scaling, softcap, s_aux, causal, dtype)
        return without_gradient(out, query), None
    return _attend_dense(module, query, key, value, attention_mask, scaling, softcap, s_aux, is_causal, dropout, kwargs)


def _output_dtype(query: torch.Tensor) -> torch.dtype:
    """The query's, or autocast's where that would have made it narrower."""
    kind = query.device.type
    if query.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return query.dtype


def attend_packed(
    query: torch.Tensor,
    key: KVHandle,
    value: KVHandle,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    causal: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention over the core behind both handles: [batch, T, q_heads, head_dim_v] of `dtype`; see kv4_attention."""
    held = key.held
    form = held.form
    if value.held is not held:
        raise ValueError(mismatch("value", "the handle of the same layer and update as key's", "another's"))
    if query.dim() != 4:
        raise ValueError(mismatch("query", "[batch, q_heads, tokens, head_dim]", query))
    if form.on_device and query.dtype is torch.float32:
        query = query.to(dtype)  # as autocast chose
    batch, heads, tokens, _ = query.shape
    out = torch.empty((batch, tokens, heads, form.head_dim_v), dtype=dtype, device=query.device)
    if not tokens:
        return out
    if form.on_device:
        on_stream(held.core, form.device)
    scale = scaling or 0.0
    if mask is None and tokens == 1 and softcap is None and s_aux is None:
        held.core.attend(readable(query), out.transpose(1, 2), scale=scale)  # the common decode step
        return out
    sinks = None if s_aux is None else _sinks(s_aux)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap or 0.0, "sinks": sinks}
    if mask is not None and type(mask) is not Pattern and mask.dtype is not torch.int32:
        options |= {"causal": False, "offset": _offset(mask, held), "mask": readable(mask)}
        if form.on_device:
            options["host_mask"] = on_host(mask)
        held.core.attend(readable(query), out.transpose(1, 2), **options)
        return out
    causal, offset, start, window = _limits(mask, held, tokens, causal)
    own_k, own_v = key.own, value.own
    if (
        own_k is not None
        and own_v is not None
        and causal
        and not softcap
        and supports_prefill(form, query, own_k, own_v)
        and prefill(
            held,
            query.detach(),
            own_k,
            own_v,
            out,
            scale=scale,
            sinks=sinks,
            start=start,
            window=window,
            offset=offset,
        )
    ):
        return out
    options |= {"causal": causal, "offset": offset, "start": start, "window": window}
    held.core.attend(readable(query), out.transpose(1, 2), **options)
    return out


def _offset(mask: torch.Tensor, held: Held) -> int:
    """Position of a mask's first column: its last one is the newest token."""
    offset = held.length - mask.shape[-1]
    if offset < 0:
        expected = f"at most {held.length} columns, the tokens in the cache"
        raise ValueError(mismatch("attention_mask", expected, mask.shape[-1]))
    return offset


def _limits(
    mask: torch.Tensor | None, held: Held, tokens: int, causal: bool
) -> tuple[bool, int, torch.Tensor | None, torch.Tensor | None]:
    """(causal, offset, start, window) of core.attend, for a mask that is no general one."""
    first, own = held.length - held.columns, held.form.sliding_window
    offset, start, window, shared = first, None, None, 0
    if mask is not None:
        start, window, shared = limits_of(mask)
        causal = True
        if type(mask) is Pattern:
            causal, offset = mask.causal, _offset(mask, held)
        elif getattr(mask, "kv4_positions", False):
            offset = 0
    if not own or held.columns <= own:  # a single query has no more
        return causal or tokens == 1, offset, start, window
    if shared == own:
        return causal, offset, start, None  # the core's own
    # The mask's window is wider than the core's: pass explicit limits over all columns of the update's handles.
    batch = held.batch
    start = _all(batch, 0) if start is None else (start + (offset - first)).clamp_(min=0)
    return causal, first, start, _all(batch, 0) if window is None else window


@torch.library.custom_op("kv4::attend", mutates_args=(), tags=TAGS)
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
    """The kv4 attention of query [batch, q_heads, T, head_dim] over what the layer holds since its last kv4::append:
    [batch, T, q_heads, head_dim_v], contiguous, in the query's dtype."""
    key, value = take_appended(layer)
    return attend_packed(query, key, value, mask, scaling, softcap, s_aux, causal, query.dtype)


@attend.register_fake
def _(state, query, layer, head_dim_v, mask, scaling, softcap, s_aux, causal):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, head_dim_v))


@torch.compiler.disable
def _attend_uncompiled(*args: Any) -> torch.Tensor:
    """Handles made in eager mode that reach a compiled graph: forces a graph break here."""
    return attend_packed(*args)


def _dequantised(handle: KVHandle | torch.Tensor) -> torch.Tensor:
    if not isinstance(handle, KVHandle):
        return handle
    return handle.held.dense(handle.which, handle.offset, handle.columns)


def _sinks(s_aux: torch.Tensor) -> torch.Tensor:
    return s_aux.detach().reshape(-1).to(torch.float32).contiguous()


@functools.lru_cache(maxsize=64)
def _all(batch: int, value: int) -> torch.Tensor:
    return torch.full((batch,), value, dtype=torch.int32)


def _attend_dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: KVHandle | torch.Tensor,
    value: KVHandle | torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    is_causal: bool | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    key = key.dense() if isinstance(key, KVHandle) else key
    value = value.dense() if isinstance(value, KVHandle) else value
    q_length, kv_length = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    start = window = None
    compact = mask is None or type(mask) is Pattern or mask.dtype is torch.int32
    if compact:
        if mask is not None:
            start, window, _ = limits_of(mask)
            causal = mask.causal if type(mask) is Pattern else True
        # torch's is_causal aligns the mask to the upper left: correct only where queries and keys are the same tokens.
        plain = start is None and window is None and (not causal or q_length in (1, kv_length))
        mask = None if plain else expand(start, window, q_length, kv_length, query.device, causal)
        is_causal = plain and causal
    grouped = query.shape[1] != key.shape[1] and not hasattr(module, "num_key_value_groups")
    if softcap or s_aux is not None or grouped:
        if mask is None and is_causal and q_length > 1:
            mask = expand(None, None, q_length, kv_length, query.device)
        return eager(module, query, key, value, mask, scaling, softcap, s_aux, dropout), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    if start is not None and mask is not None:
        # Fully masked rows: torch's kernels may return NaN there.
        output = output.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0.0)
    return output, None


def eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Softmax over the columns and a sink logit without value, in float32; sdpa has no kernel for sinks."""
    batch, heads, q_length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, q_length, dim)
    scores = torch.matmul(grouped.float(), key.float()[:, :, None].mT).reshape(batch, heads, q_length, -1)
    scores = scores * (scaling or dim**-0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    sink = None if s_aux is None else s_aux.reshape(1, -1, 1, 1).float()
    top = scores.amax(-1, keepdim=True)
    top = (top if sink is None else torch.maximum(top, sink)).clamp(min=-1e30)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    weights = torch.where(total > 0, weights / total, 0.0)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    grouped_weights = weights.reshape(batch, kv_heads, heads // kv_heads, q_length, -1)
    output = torch.matmul(grouped_weights, value.float()[:, :, None]).reshape(batch, heads, q_length, -1)
    return output.transpose(1, 2).to(query.dtype).contiguous()
