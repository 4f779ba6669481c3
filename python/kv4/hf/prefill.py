"""Attention of a long call: torch's flash kernel over the call's own exact keys and values, the packed cache for
everything earlier, and the two merged through their log-sum-exp.

With S1 and S2 disjoint token sets, o_i the softmax average over S_i and e_i its log-sum-exp,
    o = sum_i o_i exp(e_i - e),   e = log sum_i exp(e_i)
and an attention sink is one more term of e that brings no value (Dao, FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .device import readable
from .handle import Form, Held

_flash_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_cuda = getattr(torch.ops.aten, "_flash_attention_forward", None)
_PLAIN_BLOCK = 256  # queries of a block: bounds the scores held at once
_NEVER = -1.0e30  # below every log-sum-exp, so that exp(x - _NEVER) of an empty set is exp(-inf) = 0


def supports_prefill(form: Form, query: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor) -> bool:
    """True where the flash kernel may answer for the call's own tokens: it reads one head dim and one dtype, and the
    recipe must let attention see them exactly."""
    return (
        _has_flash(query)
        and form.attends_exact_call
        and own_k.shape[-1] == own_v.shape[-1]
        and query.dtype == own_k.dtype
        and query.dim() == 4
        and query.shape[0] == own_k.shape[0]
        and query.shape[2] == own_k.shape[2]
        and query.shape[3] == own_k.shape[3]
        and query.shape[1] % own_k.shape[1] == 0
    )


def _has_flash(query: torch.Tensor) -> bool:
    """Something here answers for the call's own tokens with their log-sum-exp."""
    if query.is_cpu:
        return _flash_cpu is not None
    if not query.is_cuda:
        return True  # _plain_blocks
    dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return _flash_cuda is not None and half and dim <= 256 and dim % 8 == 0


def prefill(
    held: Held,
    query: torch.Tensor,
    own_k: torch.Tensor,
    own_v: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None,
    start: torch.Tensor | None,
    window: torch.Tensor | None,
    offset: int,
) -> bool:
    """Writes causal attention of query [batch, q_heads, T, d] to out [batch, T, q_heads, d]. False, with nothing
    written, where a visible value is not finite (the core refuses those by name); on a CUDA device the call does not
    wait to find out: such a value makes the outputs that see it NaN, and a later call raises. own_k, own_v are
    [batch, kv_heads, T, d]; start, window, offset are those of core.attend: int32 [batch] in CPU memory or None,
    columns counted from position `offset`."""
    batch, heads, tokens, dim = query.shape
    before = held.length - tokens
    first = [0] * batch if start is None else [min(max(x + offset - before, 0), tokens) for x in start.tolist()]
    limit = [held.form.sliding_window] * batch if window is None else window.tolist()
    groups = _row_groups(first, limit)
    if not held.form.on_device and not all(
        _finite(x[rows, :, begin:]) for x in (query, own_k, own_v) for rows, begin, _ in groups if begin < tokens
    ):
        return False

    earlier = None
    if before > 0 or held.form.records_queries:
        of_float = {"dtype": torch.float32, "device": query.device}
        o = torch.empty((batch, heads, tokens, dim), **of_float)
        m = torch.empty((batch, heads, tokens), **of_float)
        total = torch.empty((batch, heads, tokens), **of_float)
        options: dict[str, Any] = {"scale": scale, "offset": offset, "start": start, "window": window}
        held.core.attend_partial(query, o, m, total, upto=before, **options)
        if before > 0:
            earlier = (o, m, total)

    blocks = _cpu_blocks if query.is_cpu else _cuda_blocks if query.is_cuda else _plain_blocks
    factor = scale or dim**-0.5
    for rows, begin, width in groups:
        if begin > 0:
            out[rows, :begin] = 0
            if earlier is not None or sinks is not None:
                _merge(out[rows, :begin].transpose(1, 2), None, None, earlier, sinks, rows, slice(0, begin))
        if begin == tokens:
            continue
        for lo, hi, o, lse in blocks(query[rows], own_k[rows], own_v[rows], factor, begin, width):
            target = out[rows, lo:hi].transpose(1, 2)
            if earlier is None and sinks is None:
                target.copy_(o)
            else:
                _merge(target, o, lse, earlier, sinks, rows, slice(lo, hi))
    return True


def _row_groups(first: list[int], limit: list[int]) -> list[tuple[slice, int, int]]:
    """Runs of batch rows with one first token and one window: (rows, first token, window)."""
    groups, begin = [], 0
    for row in range(1, len(first) + 1):
        if row == len(first) or first[row] != first[begin] or limit[row] != limit[begin]:
            groups.append((slice(begin, row), first[begin], limit[begin]))
            begin = row
    return groups


def _finite(x: torch.Tensor) -> bool:
    low, high = torch.aminmax(x)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _cpu_blocks(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, begin: int, width: int):
    """Causal attention of the tokens [begin, T) among themselves, each seeing the newest `width` (0 = all): yields
    (lo, hi, output [rows, heads, hi - lo, d], log-sum-exp [rows, heads, hi - lo]) over blocks of queries.
    A window is served block by block, so that the keys outside it are never read."""
    tokens = query.shape[2]
    if not width or tokens - begin <= width:
        o, lse = _flash_cpu(query[:, :, begin:], k[:, :, begin:], v[:, :, begin:], 0.0, True, scale=factor)
        yield begin, tokens, o, lse
        return
    block = max(64, (width + 1) // 2)
    for lo in range(begin, tokens, block):
        hi = min(lo + block, tokens)
        key_lo = max(begin, lo - width + 1)
        row = torch.arange(lo, hi)[:, None]
        column = torch.arange(key_lo, hi)[None]
        hidden = (column > row) | (column <= row - width)
        mask = torch.zeros((1, 1, *hidden.shape), dtype=query.dtype).masked_fill_(hidden, -math.inf)
        o, lse = _flash_cpu(
            query[:, :, lo:hi],
            k[:, :, key_lo:hi],
            v[:, :, key_lo:hi],
            0.0,
            False,
            attn_mask=mask,
            scale=factor,
        )
        yield lo, hi, o, lse


def _cuda_blocks(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, begin: int, width: int):
    """As _cpu_blocks, in one block: torch's CUDA kernel takes [rows, tokens, heads, d], grouped heads and windows."""
    tokens = query.shape[2]
    q, k, v = (readable(x[:, :, begin:].transpose(1, 2)) for x in (query, k, v))
    length = tokens - begin
    window = {"window_size_left": width - 1, "window_size_right": 0} if width and length > width else {}
    o, lse, *_ = _flash_cuda(q, k, v, None, None, length, length, 0.0, True, False, scale=factor, **window)
    yield begin, tokens, o.transpose(1, 2), lse[..., :length]


def _plain_blocks(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, begin: int, width: int):
    """_cpu_blocks by matrix products in float32, for devices whose kernels return no log-sum-exp."""
    batch, heads, tokens, dim = query.shape
    kv_heads = k.shape[1]
    for lo in range(begin, tokens, _PLAIN_BLOCK):
        hi = min(lo + _PLAIN_BLOCK, tokens)
        key_lo = max(begin, lo - width + 1) if width else begin
        row = torch.arange(lo, hi, device=query.device)[:, None]
        column = torch.arange(key_lo, hi, device=query.device)[None]
        hidden = (column > row) | (column <= row - width) if width else column > row
        grouped = query[:, :, lo:hi].float().reshape(batch, kv_heads, heads // kv_heads, hi - lo, dim) * factor
        scores = grouped @ k[:, :, None, key_lo:hi].float().mT
        scores = scores.masked_fill(hidden, -math.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        o = (scores - lse).exp() @ v[:, :, None, key_lo:hi].float()
        yield lo, hi, o.reshape(batch, heads, hi - lo, dim), lse.reshape(batch, heads, hi - lo)


def _merge(
    target: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor | None,
    earlier: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    sinks: torch.Tensor | None,
    rows: slice,
    tokens: slice,
) -> None:
    """target <- the softmax average over both token sets; 0 where neither has a token. All are [rows, heads, tokens]
    plus d; `earlier` is the core's unnormalised state of the whole call, (o, lse) normalised or None for no tokens."""
    terms, total = [], None
    if earlier is not None:
        po, pm, pl = (x[rows, :, tokens] for x in earlier)
        terms.append((po, pm))
        total = pm + torch.log(pl)
    if lse is not None:
        terms.append((o.float(), lse))
        total = lse if total is None else torch.logaddexp(total, lse)
    if total is None:
        return
    if sinks is not None:
        total = torch.logaddexp(total, sinks.view(1, -1, 1))
    total = total.clamp(min=_NEVER)
    result = None
    for value, exponent in terms:
        part = value * torch.exp(exponent - total)[..., None]
        result = part if result is None else result.add_(part)
    target.copy_(result)
