"""The attention function behind attn_implementation="kv4"."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import ops
from .device import on_stream
from .handle import KVHandle
from .mask import expand, on_host, row_limits
from .ops import CompiledHandle
from .prefill import prefill, readable, supports_prefill

if TYPE_CHECKING:
    from .cache import KV4Layer

_HANDLES = (KVHandle, CompiledHandle)


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
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [batch, q_heads, T, head_dim] over a KV4Cache's handles, or over dense keys and values
    [batch, kv_heads, columns, head_dim] (no cache, cross-attention, another cache); q_heads a multiple of kv_heads.

    attention_mask: None (causal, or all where not causal), int32 [batch, 1, 1, 2] from kv4_mask, bool (True =
    visible) or float (added to the scores) [batch or 1, q_heads or 1, T or 1, columns]. A row that sees nothing is 0.
    scaling: multiplies q.k; None means head_dim ** -0.5. softcap: c * tanh(score / c), before the mask.
    s_aux: [q_heads] sink logits. sliding_window counts only where attention_mask is None.

    Returns (output [batch, T, q_heads, head_dim_v], contiguous, in the query's dtype, None).
    Errors: RuntimeError for a stale handle or where gradients are wanted; ValueError naming the argument for shapes
    that do not fit, or NaN or infinity that a query would see. May be called again on one handle.
    """
    if type(key) is KVHandle and key.layer.cross_attention and query.shape[2] > key.length:
        # The core's queries are those of tokens that it holds.
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
                return _attend_in_graph(
                    query, key.layer, attention_mask, scaling, softcap, s_aux, causal, sliding_window
                ), None
            key, value = key.now(), value.now()
        attend = _attend_uncompiled if torch.compiler.is_dynamo_compiling() else attend_packed
        return attend(query, key, value, attention_mask, scaling, softcap, s_aux, causal, sliding_window), None
    return _attend_dense(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling,
        softcap,
        s_aux,
        is_causal,
        sliding_window,
        dropout,
        kwargs,
    )


def attend_packed(
    query: torch.Tensor,
    key: KVHandle,
    value: KVHandle,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    causal: bool,
    sliding_window: int | None,
) -> torch.Tensor:
    layer = key.layer
    if key.version != layer.version or value.version != layer.version or value.layer is not layer:
        key.check()
        value.check()
        raise ValueError("value: expected the handle of the same layer as key's; got another layer's")
    if query.dim() != 4:
        raise ValueError(f"query: expected [batch, q_heads, tokens, head_dim]; got {list(query.shape)}")
    batch, heads, tokens, _ = query.shape
    out = torch.empty((batch, tokens, heads, layer.head_dim_v), dtype=query.dtype, device=query.device)
    if not tokens:
        return out
    if layer.on_device:
        on_stream(layer)
    scale = scaling or 0.0
    start = window = None
    offset = 0
    if mask is None:
        if sliding_window and causal and key.columns > sliding_window:
            window = _windows(batch, sliding_window)
    elif mask.dtype is torch.int32:
        start, window, shared = row_limits(mask)
        if shared and shared == layer.sliding_window:
            window = None  # the core's own
        causal = True
        offset = 0 if getattr(mask, "kv4_positions", False) else key.length - key.columns
    else:
        offset = key.length - mask.shape[-1]
        if offset < 0:
            raise ValueError(
                f"attention_mask: expected at most {key.length} columns, the tokens in the cache; got {mask.shape[-1]}"
            )
        options = {"scale": scale, "causal": False, "offset": offset, "mask": readable(mask)}
        if layer.on_device:
            options["host_mask"] = on_host(mask)
        if softcap:
            options["softcap"] = softcap
        if s_aux is not None:
            options["sinks"] = _sinks(s_aux)
        layer.core.attend(readable(query), out.transpose(1, 2), **options)
        return out
    if start is None and window is None and softcap is None and s_aux is None and causal and key.own is None:
        layer.core.attend(readable(query), out.transpose(1, 2), scale=scale)  # the common step of decoding
        return out
    sinks = None if s_aux is None else _sinks(s_aux)
    own_k, own_v = key.own, value.own
    if (
        own_k is not None
        and own_v is not None
        and causal
        and not softcap
        and supports_prefill(layer, query, own_k, own_v)
        and prefill(
            layer,
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
    layer.core.attend(
        readable(query),
        out.transpose(1, 2),
        scale=scale,
        softcap=softcap or 0.0,
        sinks=sinks,
        causal=causal,
        offset=offset,
        start=start,
        window=window,
    )
    return out


def _attend_in_graph(
    query: torch.Tensor,
    layer: KV4Layer,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    causal: bool,
    sliding_window: int | None,
) -> torch.Tensor:
    return ops.attend(
        layer.state, query, layer.number, layer.head_dim_v, mask, scaling, softcap, s_aux, causal, sliding_window
    )


@torch.compiler.disable
def _attend_uncompiled(*args: Any) -> torch.Tensor:
    """Handles of eager mode that meet a compiled graph: it is left here."""
    return attend_packed(*args)


def _dequantised(handle: KVHandle | torch.Tensor) -> torch.Tensor:
    if not isinstance(handle, KVHandle):
        return handle
    handle.check()
    return handle.layer.dense(handle.which, handle.offset, handle.columns)


def _sinks(s_aux: torch.Tensor) -> torch.Tensor:
    return s_aux.detach().reshape(-1).to(torch.float32).contiguous()


@functools.lru_cache(maxsize=64)
def _windows(batch: int, window: int) -> torch.Tensor:
    return torch.full((batch,), window, dtype=torch.int32)


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
    sliding_window: int | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    key = key.dense() if isinstance(key, KVHandle) else key
    value = value.dense() if isinstance(value, KVHandle) else value
    q_length, kv_length = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    start = window = None
    compact = mask is None and causal or mask is not None and mask.dtype is torch.int32
    if mask is not None and mask.dtype is torch.int32:
        start, window, _ = row_limits(mask)
    elif mask is None and causal and sliding_window and kv_length > sliding_window:
        window = _windows(query.shape[0], sliding_window)
    if compact:
        # torch's own causal flag aligns to the upper left: right only where queries and keys are the same tokens.
        plain = start is None and window is None and (q_length == 1 or q_length == kv_length)
        mask = None if plain else expand(start, window, q_length, kv_length, query.device)
        is_causal = plain
    elif mask is None:
        is_causal = False
    grouped = query.shape[1] != key.shape[1] and not hasattr(module, "num_key_value_groups")
    if softcap or s_aux is not None or grouped:
        if mask is None and is_causal and q_length > 1:
            mask = expand(None, None, q_length, kv_length, query.device)
        return _eager(module, query, key, value, mask, scaling, softcap, s_aux, dropout), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    if start is not None and mask is not None:
        # Rows that see nothing: torch's kernels may give NaN there.
        output = output.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0.0)
    return output, None


def _eager(
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
    """softmax over the columns and one sink logit that carries no value, in float32: what sdpa has no kernel for."""
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
