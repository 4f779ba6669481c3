"""What an error of a sealed key or value does to the model's next-token distributions, to second order.

For a small error e_j of what a cache holds at position j, sum over t of KL(p_t || q_t) is 1/2 sum over t of
E_y (g_tj . e_j)^2 with y drawn from p_t and g_tj the gradient of log p_t(y) with respect to that entry (the Fisher
information is the Hessian of a KL divergence; Amari, Natural gradient, Neural Computation 10, 1998). Gradients of
different t have mean 0 and independent y, so one backward pass of sum over t of log p_t(y_t) gives g_j = sum over t of
g_tj, and (g_j . e_j)^2 is an unbiased estimate of the sum. It holds all that lies behind the cache: attention's own
weights, the output projection, which layers matter, and that queries see the newest tokens exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kv4._core import PAGE_TOKENS
from kv4.evaluate.scores import Head
from kv4.evaluate.simulation import _no_mask, attend_run, causal, page_runs

Tensor = torch.Tensor
NAME = "kv4_sensitivity"
SINKS, WINDOW = 4, 64
STRIDE = 8  # of these many next-token distributions one is drawn from
_ROWS = 64


@dataclass
class Rows:
    """One layer of one window: query [q_heads, T, d], key and value [kv_heads, T, d], and the gradients [kv_heads,
    T - sinks, d], scaled so that 1/2 sum (g . e)^2 is nats per token."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_gradient: Tensor
    value_gradient: Tensor

    def divergence(self, key: Tensor, value: Tensor) -> tuple[float, float]:
        """Expected KL divergence, nats per token, of keys and values [kv_heads, T - sinks, d] as read back."""
        parts = []
        for gradient, read, own in ((self.key_gradient, key, self.key), (self.value_gradient, value, self.value)):
            error = read.double() - own[:, SINKS:].double()
            parts.append(float((gradient.double() * error).sum(-1).square().sum()) / 2)
        return parts[0], parts[1]


@dataclass
class _Taken:
    query: Tensor
    key: Tensor
    value: Tensor
    errors: tuple[Tensor, Tensor]


_taken: dict[int, _Taken] = {}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As kv4.evaluate.simulation's, with an error of 0 added to what is sealed, whose gradient is asked for."""
    errors = tuple(torch.zeros_like(x[:, :, SINKS:].detach()).requires_grad_() for x in (key, value))
    _taken[module.layer_idx] = _Taken(query[0].detach(), key[0].detach(), value[0].detach(), errors)
    parts = []
    for lo, hi, sealed in page_runs(query.shape[2], SINKS, WINDOW, PAGE_TOKENS):
        first = max(0, lo - sliding_window + 1) if sliding_window else 0
        mask = causal(torch.arange(lo, hi)[:, None], torch.arange(first, hi)[None], sliding_window)
        k, v = (_seen(x, e, first, sealed, hi) for x, e in zip((key, value), errors, strict=True))
        parts.append(attend_run(module, query[:, :, lo:hi], k, v, mask, (scaling, softcap, s_aux)))
    return torch.cat(parts, 1), None


def _seen(rows: Tensor, error: Tensor, first: int, sealed: int, end: int) -> Tensor:
    """Rows `first` ... `end` - 1, with the error on those from the sinks to `sealed`."""
    begin = max(first, SINKS)
    if sealed <= begin:
        return rows[:, :, first:end]
    held = rows[:, :, begin:sealed] + error[:, :, begin - SINKS : sealed - SINKS]
    return torch.cat([rows[:, :, first:begin], held, rows[:, :, sealed:end]], 2)


def sensitivities(model: Any, ids: Tensor, seed: int = 0) -> list[Rows]:
    """Rows of every layer, from one forward and one backward pass over a window of ids [1, T]. Parameters get no
    gradients. Errors: ValueError for a window in which nothing is sealed."""
    start = SINKS + WINDOW + PAGE_TOKENS
    if ids.shape[1] <= start:
        raise ValueError(f"ids: expected more than {start} tokens, so that a page is sealed; got {ids.shape[1]}")
    wanted = [p for p in model.parameters() if p.requires_grad]
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _taken.clear()
    try:
        for p in wanted:
            p.requires_grad_(False)
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
        gradient = _drawn(model, hidden.detach(), start, seed)
        layers = [_taken[i] for i in sorted(_taken)]
        leaves = [leaf for layer in layers for leaf in layer.errors]
        found = torch.autograd.grad(hidden, leaves, gradient)
    finally:
        for p in wanted:
            p.requires_grad_(True)
        model.set_attn_implementation(before)
        _taken.clear()
    unit = (STRIDE / (ids.shape[1] - start)) ** 0.5
    return [
        Rows(layer.query, layer.key, layer.value, found[2 * i][0] * unit, found[2 * i + 1][0] * unit)
        for i, layer in enumerate(layers)
    ]


def _drawn(model: Any, hidden: Tensor, start: int, seed: int) -> Tensor:
    """The gradient, with respect to hidden [T, h], of sum log p_t(y_t) over one position in STRIDE from `start` on,
    y_t drawn from p_t."""
    random = torch.Generator().manual_seed(seed)
    head, gradient = Head(model), torch.zeros_like(hidden)
    for lo in range(start, hidden.shape[0], _ROWS * STRIDE):
        part = slice(lo, lo + _ROWS * STRIDE, STRIDE)
        with torch.enable_grad():
            leaf = hidden[part].clone().requires_grad_()
            log_p = torch.log_softmax(head(leaf).float(), -1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
            gradient[part] = torch.autograd.grad(log_p.gather(1, drawn).sum(), leaf)[0]
    return gradient


def predicted(
    windows: Sequence[Sequence[Rows]], read: Callable[[int, Rows], tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Expected KL divergence, nats per token, from errors of keys and of values: mean over windows of the sum over
    layers. read(layer, rows): keys and values as read back. Errors of different entries are taken as independent."""
    sums = [0.0, 0.0]
    for layers in windows:
        for index, rows in enumerate(layers):
            for side, part in enumerate(rows.divergence(*read(index, rows))):
                sums[side] += part / len(windows)
    return sums[0], sums[1]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)
