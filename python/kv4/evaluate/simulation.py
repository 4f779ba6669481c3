"""A model's forward over a whole window, each query seeing keys and values as a cache of a Variant would hold them.

Generation's semantics in one call: the query at position t sees its sinks and window exact and the pages that are due
before its token came as they are read back, which is what decoding token by token sees (kv4/cache.h). Hidden states of
earlier tokens are those of the same cache, since every layer's keys and values come from such attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kv4._core import QUERY_STRIDE
from kv4.calibration import Calibration
from kv4.evaluate.calibration import lambda_from_energies
from kv4.evaluate.fake import lightest, seal
from kv4.evaluate.rotations import rotation
from kv4.evaluate.variant import REFINED_BITS, SideVariant, Variant
from kv4.hf.attention import eager
from kv4.messages import mismatch

Tensor = torch.Tensor
NAME = "kv4_simulated"
_RUN = 256  # queries of one attention call where no page boundary ends it
# Sees (layer, query [q_heads, T, d], key [kv_heads, T, d], value): rotary positions applied, scaling not.
Observer = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass
class _Session:
    variant: Variant | None
    calibration: Calibration | None
    observer: Observer | None
    matrices: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)


_session: _Session | None = None


@contextmanager
def simulated(
    model: Any,
    variant: Variant | None = None,
    calibration: Calibration | None = None,
    observer: Observer | None = None,
) -> Iterator[None]:
    """Runs `model` under `variant` (None: exact), and puts its own attention back. Calls take one sequence from its
    first token and no cache. Errors: ValueError where the variant needs a calibration that is missing."""
    global _session
    if variant is not None and calibration is None:
        for name, side in (("key", variant.key), ("value", variant.value)):
            if side.lambda_ == "given" or side.rotation == "given" or side.rounding == "moment":
                raise ValueError(f"calibration: expected one for the variant's {name}s; got none")
    before, outer = model.config._attn_implementation, _session
    model.set_attn_implementation(NAME)
    _session = _Session(variant, calibration, observer)
    try:
        yield
    finally:
        _session = outer
        model.set_attn_implementation(before)


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
    """query [1, q_heads, T, d], key and value [1, kv_heads, T, d]; returns [1, T, q_heads, d]. Causal."""
    session = _session
    if session is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(mismatch("query", "one whole sequence inside simulated()", query))
    layer = module.layer_idx
    if session.observer is not None:
        session.observer(layer, query[0], key[0], value[0])
    variant = session.variant
    tokens = query.shape[2]
    options = (scaling, softcap, s_aux, sliding_window)
    if variant is None or variant.seal == "never":
        runs = [(lo, min(lo + _RUN, tokens), 0) for lo in range(0, tokens, _RUN)]
        return _attend(module, query, key, value, runs, lambda n: None, options), None
    sealed_k, sealed_v = seal_layer(session, layer, query[0], key[0], value[0])
    mixed_k, mixed_v = key.clone(), value.clone()
    body = variant.sinks if variant.chosen == "first" else 0
    held = [body]

    def seal_to(position: int) -> None:
        """Positions below `position` are read as sealed from now on."""
        if position > held[0]:
            mixed_k[0, :, held[0] : position] = sealed_k[:, held[0] - body : position - body]
            mixed_v[0, :, held[0] : position] = sealed_v[:, held[0] - body : position - body]
            held[0] = position

    if variant.seal in ("arrival", "after"):
        seal_to(tokens)
        runs = [(lo, min(lo + _RUN, tokens), 0) for lo in range(0, tokens, _RUN)]
        own = (key, value) if variant.seal == "after" else None
        return _attend(module, query, mixed_k, mixed_v, runs, seal_to, options, own), None
    runs = list(page_runs(tokens, body, variant.window, variant.page))
    return _attend(module, query, mixed_k, mixed_v, runs, seal_to, options), None


def page_runs(tokens: int, body: int, window: int, page: int) -> Iterator[tuple[int, int, int]]:
    """(first query, last + 1, end of the sealed tokens that all of them see). The query at position t sees the pages
    due once t tokens are held: (t - body - window) // page."""
    lo = 0
    while lo < tokens:
        pages = max(0, lo - body - window) // page
        hi = min(tokens, body + window + (pages + 1) * page, lo + 4 * _RUN)
        yield lo, hi, body + pages * page if pages else 0
        lo = hi


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: list[tuple[int, int, int]],
    seal_to: Callable[[int], None],
    options: tuple[float | None, float | None, Tensor | None, int | None],
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """own: exact keys and values of which a query sees its own token, in place of what `key` and `value` hold."""
    scaling, softcap, s_aux, sliding = options
    parts = []
    for lo, hi, sealed in runs:
        seal_to(sealed)
        first = max(0, lo - sliding + 1) if sliding else 0
        row = torch.arange(lo, hi)[:, None]
        column = torch.arange(first, hi)[None]
        mask = causal(row, column, sliding)
        q, k, v = query[:, :, lo:hi], key[:, :, first:hi], value[:, :, first:hi]
        if own is not None:
            mask = torch.cat([mask & (column < row), torch.arange(lo, hi)[None] == row], 1)
            k, v = (torch.cat([x, y[:, :, lo:hi]], 2) for x, y in zip((k, v), own, strict=True))
        parts.append(attend_run(module, q, k, v, mask, (scaling, softcap, s_aux)))
    return torch.cat(parts, 1)


def causal(row: Tensor, column: Tensor, sliding: int | None) -> Tensor:
    """Whether the query at position row [n, 1] sees the token at column [1, m]."""
    mask = column <= row
    return mask & (column > row - sliding) if sliding else mask


def attend_run(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    options: tuple[float | None, float | None, Tensor | None],
) -> Tensor:
    """Exact attention [1, n, q_heads, d] of q [1, q_heads, n, d] over k and v [1, kv_heads, m, d]; options: scaling,
    softcap, sinks."""
    scaling, softcap, s_aux = options
    if softcap or s_aux is not None:
        return eager(module, q, k, v, mask[None, None], scaling, softcap, s_aux, 0.0)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[None, None], scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def seal_layer(session: _Session, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, T - sinks, d] from the first page on, as the cache reads them back. A last page that
    is not full is there for `arrival` only: no query sees it otherwise."""
    variant = session.variant
    assert variant is not None
    body = variant.sinks if variant.chosen == "first" else 0
    sides = _sealed_sides(session, layer, query, key, value, body)
    if variant.chosen == "mass" and variant.sinks:
        _spare_heavy(variant, query, key, sides, value)
    return sides[0], sides[1]


def _sealed_sides(session: _Session, layer: int, query: Tensor, key: Tensor, value: Tensor, body: int) -> list[Tensor]:
    variant = session.variant
    assert variant is not None
    sides = []
    own = variant.sides_of(layer)
    for which, side, rows in (("key", own[0], key), ("value", own[1], value)):
        rows = rows[:, body:]
        if side.bits == 16 or rows.shape[1] == 0:
            sides.append(rows)
            continue
        lam = _lambda(session, layer, side, which, query, key, body)
        matrix, inverse = _matrices(session, layer, side, which, rows.shape[-1])
        hessian = None
        if side.rounding == "moment" and which == "key":
            hessian = _hessian(session.calibration, layer, lam, inverse)
        done = seal(
            rows, side, matrix, inverse, lambda_=lam, page=variant.page, hessian=hessian, values=which == "value"
        )
        if variant.refined and which == "key":
            places = lightest(value[:, body:], variant.refined, variant.page)
            done.rows = _refined(done.rows, rows, places, side, (matrix, inverse, lam), variant.page)
        sides.append(done.rows)
    return sides


def _refined(
    read: Tensor,
    rows: Tensor,
    places: Tensor,
    side: SideVariant,
    basis: tuple[Tensor, Tensor, Tensor | None],
    page: int,
) -> Tensor:
    """`read` [heads, T, d], with what it leaves of `rows` at `places` sealed once more, in 4 bits, and added."""
    if not places.numel():
        return read
    at = (places + page * torch.arange(places.shape[1])[None, :, None]).flatten(1)
    at = at[..., None].expand(-1, -1, rows.shape[-1])
    matrix, inverse, lam = basis
    levels = "lloyd_max" if side.levels == "trellis" else side.levels
    second = dataclasses.replace(side, bits=REFINED_BITS, mean="none", rounding="nearest", levels=levels)
    left = seal(rows.gather(1, at) - read.gather(1, at), second, matrix, inverse, lambda_=lam, page=page)
    return read.scatter_add(1, at, left.rows.to(read.dtype))


def _lambda(
    session: _Session, layer: int, side: SideVariant, which: str, query: Tensor, key: Tensor, body: int
) -> Tensor | None:
    variant = session.variant
    assert variant is not None
    if side.lambda_ == "none":
        return None
    if side.lambda_ == "given":
        assert session.calibration is not None
        lam = session.calibration.lambda_of(which, layer)
    else:
        heads, tokens, d = key.shape
        if side.lambda_ == "auto":
            # Known when the first page is due: the last of every QUERY_STRIDE queries before (src/ledger/queries.h),
            # and the keys of the pages held by then.
            queries = query[:, QUERY_STRIDE - 1 : body + variant.window + variant.page : QUERY_STRIDE]
            keys = key[:, body : body + variant.page * (1 + variant.window // variant.page)]
            shrink, damping = side.shrink, side.damping
        else:
            queries, keys, shrink, damping = query, key[:, body:], 0.0, 1.0
        if keys.shape[1] < min(variant.page, tokens - body):
            return None
        energy_q = queries.double().square().reshape(heads, -1, queries.shape[1], d).sum((1, 2))
        energy_k = sum(
            block.sub(block.mean(1, keepdim=True)).square().sum(1) for block in keys.double().split(variant.page, 1)
        )
        lam = lambda_from_energies(energy_q, energy_k, shrink) ** damping
    return lam


def _matrices(session: _Session, layer: int, side: SideVariant, which: str, d: int) -> tuple[Tensor, Tensor]:
    key = (which, layer) if side.rotation == "given" else (side.rotation, d, side.seed, side.reflectors)
    if key not in session.matrices:
        if side.rotation == "given":
            assert session.calibration is not None
            matrix = session.calibration.matrix_of(which, layer).double()
            session.matrices[key] = matrix, torch.linalg.inv(matrix)
        else:
            matrix = torch.from_numpy(rotation(side.rotation, d, side.seed, side.reflectors))
            session.matrices[key] = matrix, matrix.mT.contiguous()
    return session.matrices[key]


def _hessian(calibration: Calibration | None, layer: int, lam: Tensor | None, inverse: Tensor) -> Tensor:
    """E q' q'^T of q' = R^-T (q / lambda), [kv_heads, d, d]."""
    assert calibration is not None
    moments = calibration.query_moments(layer).double()
    if lam is not None:
        moments = moments / lam.double()[:, :, None] / lam.double()[:, None, :]
    back = inverse.double().mT
    return back @ moments @ back.mT


def _spare_heavy(variant: Variant, query: Tensor, key: Tensor, sides: list[Tensor], value: Tensor) -> None:
    """Per page, the `sinks` tokens that drew most attention from the queries up to its sealing stay exact."""
    heads, tokens, d = key.shape
    page, seen = variant.page, variant.window + variant.page
    grouped = query.reshape(heads, -1, tokens, d)
    for first in range(0, tokens - page + 1, page):
        end = min(first + seen, tokens)
        scores = torch.einsum("hgqd,hkd->hgqk", grouped[:, :, first:end], key[:, :end]) * d**-0.5
        row = torch.arange(first, end)[:, None]
        scores = scores.masked_fill(torch.arange(end)[None] > row, -torch.inf)
        mass = torch.softmax(scores, -1)[..., first : first + page].sum((1, 2))
        kept = mass.topk(variant.sinks, -1).indices + first
        for h in range(heads):
            sides[0][h, kept[h]] = key[h, kept[h]]
            sides[1][h, kept[h]] = value[h, kept[h]]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The simulation makes its own masks."""
    return None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)
