"""Fake quantisation: what a cache would read back, computed in torch.

The rule is that of docs/format.md, step by step; a test holds codes, scales and means against the packed cache's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kv4._core import PAGE_TOKENS
from kv4.evaluate.levels import levels, step_rule
from kv4.evaluate.trellis import BITS, decode, encode
from kv4.evaluate.variant import BYTES_GROUP, SideVariant

Tensor = torch.Tensor
_FP16_MAX = 65504.0
_GAINS = {
    "search": (0.85, 0.925, 1.0, 1.075, 1.15),
    "search_fine": tuple(0.7 + 0.05 * i for i in range(15)),
}

_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass
class Sealed:
    """rows [heads, T, d]: dequantised, in the model's basis. codes [heads, T, d]: signed magnitude index, i for a
    value >= 0 and -1 - i below (mid-tread tables: -i); of a trellis those of kv4.evaluate.trellis. scales [heads,
    groups, T] as stored; mean [heads, pages, d]: m' as stored, or None."""

    rows: Tensor
    codes: Tensor
    scales: Tensor
    mean: Tensor | None


def fp16(x: Tensor) -> Tensor:
    """Rounded to fp16, saturating, in the dtype of x."""
    return x.float().clamp(-_FP16_MAX, _FP16_MAX).half().to(x.dtype)


def seal(
    rows: Tensor,
    side: SideVariant,
    matrix: Tensor,
    inverse: Tensor,
    *,
    lambda_: Tensor | None = None,
    page: int = PAGE_TOKENS,
    hessian: Tensor | None = None,
    values: bool = False,
) -> Sealed:
    """Seals rows [heads, T, d], pages counted from the first row; the last page may be short. matrix, inverse: R and
    R^-1, [d, d] or [heads, d, d], in float64. lambda_ [heads, d] or None. hessian [heads, d, d]: second moments of
    what keys are multiplied by in the stored basis, for rounding="moment". values: which way the chains of a trellis
    run. Computes in the dtype of rows."""
    heads, tokens, d = rows.shape
    weight = torch.ones(heads, 1, d, dtype=rows.dtype) if lambda_ is None else lambda_.to(rows.dtype)[:, None]
    forth, back = matrix.to(rows.dtype), inverse.to(rows.dtype)
    mean, stored, shift = _means(rows, side, matrix, weight, page)
    x = ((rows - mean) * weight if mean is not None else rows * weight) @ forth.mT
    if shift is not None:
        x = x + shift
    chained = side.levels == "trellis" and side.bits in BITS
    table = levels("lloyd_max" if side.levels == "trellis" else side.levels, side.bits)
    width = side.group or d
    if d % width:
        raise ValueError(f"group: expected 0 or a divisor of the head dim {d}; got {side.group}")
    groups = x.view(heads, tokens, d // width, width)
    if side.scale == "affine":
        codes, held, scale = _affine(groups, 2**side.bits - 1)
        y = held.view_as(x) if shift is None else held.view_as(x) - shift
        read = y @ back.mT / weight
        return Sealed(read if mean is None else read + mean, codes.view_as(x), scale.mT, stored)
    step = _step(groups, side, table)
    if side.scale in _GAINS:
        step = _searched(groups, step, table, _GAINS[side.scale])
    if chained:
        codes, level = _paths(groups / step, side.bits, page if values else 0)
    elif side.rounding == "moment" and hessian is not None:
        codes = _moment_rounding(x, step.expand_as(groups).reshape_as(x), table, hessian)
    else:
        codes = _nearest(groups / step, table).view_as(x)
    if not chained:
        level = _level(codes, table, x.dtype)
    fitted = level.view_as(groups)
    if side.scale != "abs_max":
        scale = (groups * fitted).sum(-1) / fitted.square().sum(-1).clamp(min=1e-30)
    else:
        scale = step[..., 0].expand(groups.shape[:3])
    scale = torch.where(groups.abs().amax(-1) > 0, scale, 0.0)
    if side.stored == "bytes":
        scale = _in_octaves(scale, page)
        codes = _nearest(groups / torch.where(scale > 0, scale, 1.0)[..., None], table)
        fitted, codes = _level(codes, table, x.dtype), codes.view_as(x)
    scale = fp16(scale) if side.stored == "fp16" else scale
    y = (fitted * scale[..., None]).view_as(x)
    if shift is not None:
        y = y - shift
    back_rows = y @ back.mT / weight
    if mean is not None:
        back_rows = back_rows + mean
    return Sealed(back_rows, codes.view_as(x), scale.mT, stored)


def _paths(y: Tensor, bits: int, page: int) -> tuple[Tensor, Tensor]:
    """Codes and levels of y [heads, T, groups, width] by a trellis, chains along the channels of a group or, for pages
    of `page` tokens, along their tokens."""
    if page == 0:
        codes = encode(y, bits)
        return codes, decode(codes, bits, y.dtype)
    codes, level = [], []
    whole = y.shape[1] // page * page
    for some in (y[:, :whole].unflatten(1, (-1, page)) if whole else y[:, :0], y[:, None, whole:]):
        if not some.numel():
            continue
        turned = some.movedim(2, -1)
        found = encode(turned, bits)
        codes.append(found.movedim(-1, 2).flatten(1, 2))
        level.append(decode(found, bits, y.dtype).movedim(-1, 2).flatten(1, 2))
    return torch.cat(codes, 1), torch.cat(level, 1)


def lightest(value: Tensor, count: int, page: int = PAGE_TOKENS) -> Tensor:
    """Places [heads, pages, count] of the tokens with the least |v| in every whole page of value [heads, T, d]. Tokens
    on which attention rests where nothing is to be read have small values and keys that most queries see (Xiao et al.,
    Efficient streaming language models with attention sinks, 2024); they stand for most of the loss where there are
    any, and this finds them from the page alone."""
    pages = value.shape[1] // page
    norms = value[:, : pages * page].double().norm(dim=-1).unflatten(-1, (pages, page))
    return norms.topk(count, -1, largest=False).indices.sort(-1).values


def _means(
    rows: Tensor, side: SideVariant, matrix: Tensor, weight: Tensor, page: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(mu per row, m' per page as stored, R (lambda mu) - m' per row): [heads, T, d], [heads, pages, d]."""
    if side.mean == "none":
        return None, None, None
    heads, tokens, d = rows.shape
    pages = [rows[:, a : a + page].double().mean(1) for a in range(0, tokens, page)]
    mu = torch.stack(pages, 1)
    if side.mean == "group":
        wide = mu.view(heads, len(pages), d // side.mean_group, side.mean_group).mean(-1, keepdim=True)
        mu = fp16(wide).expand(-1, -1, -1, side.mean_group).reshape(mu.shape)
        return mu.repeat_interleave(page, 1)[:, :tokens].to(rows.dtype), mu, None
    mu = mu.to(rows.dtype)
    full = (mu.double() * weight.double()) @ matrix.double().mT
    stored = fp16(full) if side.stored == "fp16" else _in_bytes(full.unflatten(-1, (-1, BYTES_GROUP))).flatten(-2)
    shift = (full - stored).to(rows.dtype)
    spread = [x.repeat_interleave(page, 1)[:, :tokens] for x in (mu, shift)]
    return spread[0], stored, spread[1]


def _in_bytes(x: Tensor) -> Tensor:
    """x [..., n] as 8 bits an element and an fp16 step hold it."""
    step = fp16(x.abs().amax(-1, keepdim=True) / 127)
    return torch.where(step > 0, (x / step.clamp(min=1e-30)).round().clamp(-127, 127), 0.0) * step


def _in_octaves(scale: Tensor, page: int) -> Tensor:
    """Scales [heads, T, groups], each the nearest 2^(-i/16), i = 0 ... 254, of the largest of its page; 0 stays 0."""
    parts = []
    for some in scale.split(page, 1):
        top = fp16(some.amax((1, 2), keepdim=True))
        place = (16 * (top.clamp(min=1e-30) / some.clamp(min=1e-30)).log2()).round().clamp(0, 254)
        parts.append(torch.where(some > 0, top * torch.exp2(-place / 16), 0.0))
    return torch.cat(parts, 1)


def _step(groups: Tensor, side: SideVariant, table: object) -> Tensor:
    """Codes are the levels nearest to x / step; [heads, T, groups, 1], 1 where all is 0."""
    scale = side.scale if side.scale in ("rms", "abs_max") else "least_squares"
    by_largest, factor = step_rule(side.levels, side.bits, scale, groups.shape[-1])
    size = groups.abs().amax(-1, keepdim=True) if by_largest else groups.square().mean(-1, keepdim=True).sqrt()
    step = factor * size
    return torch.where(step > 0, step, 1.0)


def _affine(groups: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes 0 ... top, what they stand for, steps [heads, T, groups]) of the clipping that fits best."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, reach = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, ...] | None = None
    for share in _CLIPS:
        step, zero = fp16(2 * share * reach / top), fp16(middle - share * reach)
        codes = ((groups - zero) / torch.where(step > 0, step, 1.0)).round().clamp(0, top)
        held = codes * step + zero
        found = ((held - groups).square().sum(-1, keepdim=True), codes, held, step)
        if best is None:
            best = found
        else:
            better = found[0] < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    return best[1].to(torch.int8), best[2], best[3][..., 0]


def _searched(groups: Tensor, step: Tensor, table: object, gains: tuple[float, ...]) -> Tensor:
    """Of the steps step / gain the one whose codes fit best: with its own least-squares scale, codes leave the error
    sum x^2 - (sum x L)^2 / sum L^2."""
    best, chosen = None, step
    for gain in gains:
        level = _level(_nearest(groups * (gain / step), table), table, groups.dtype)
        fit = (groups * level).sum(-1, keepdim=True).square() / level.square().sum(-1, keepdim=True).clamp(min=1e-30)
        if best is None:
            best, chosen = fit, step / gain
        else:
            chosen = torch.where(fit > best, step / gain, chosen)
            best = torch.maximum(fit, best)
    return chosen


def _nearest(y: Tensor, table: object) -> Tensor:
    """Signed magnitude index of the nearest level; a tie takes the larger magnitude, 0 is positive."""
    edges = torch.tensor(table.boundaries, dtype=y.dtype)
    index = torch.bucketize(y.abs(), edges, right=True, out_int32=True).to(torch.int8)
    negative = -index if table.magnitude[0] == 0 else -1 - index
    return torch.where(y < 0, negative, index)


def _level(codes: Tensor, table: object, dtype: torch.dtype) -> Tensor:
    magnitude = torch.tensor(table.magnitude, dtype=dtype)
    low = -magnitude.flip(0) if table.magnitude[0] != 0 else -magnitude[1:].flip(0)
    return torch.cat([low, magnitude])[codes.int() + len(low)]


def _moment_rounding(x: Tensor, step: Tensor, table: object, hessian: Tensor) -> Tensor:
    """Channels one after another, each error spread over those still open (Frantar et al. 2023, section 3)."""
    d = x.shape[-1]
    damp = 0.01 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    full = hessian.double() + damp[:, None, None] * torch.eye(d, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(full), upper=True).to(x.dtype)
    rest, codes = x.clone(), torch.empty_like(x, dtype=torch.int8)
    for c in range(d):
        code = _nearest(rest[..., c] / step[..., c], table)
        codes[..., c] = code
        error = (rest[..., c] - _level(code, table, x.dtype) * step[..., c]) / upper[:, None, c, c]
        rest[..., c + 1 :] -= error[..., None] * upper[:, None, c, c + 1 :]
    return codes
