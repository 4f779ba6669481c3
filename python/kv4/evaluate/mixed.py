"""Sealing in a calibrated basis whose groups of channels have widths of their own.

For one side of one layer and KV head let S be the second moments of what is stored (keys about their page's mean) and H
those of what an error is weighed by, so that an error e costs 1/2 e^T H e. With H^1/2 S H^1/2 = U diag(l) U^T, ordered
from the largest l down, channels of U^T H^1/2 x are uncorrelated, have energies l, and their errors cost alike: the
transform coding gain is all there (Goyal, IEEE Signal Processing Magazine 18(5), 2001). Neighbouring channels form
groups. Inside one, channels are weighed by l^-1/4, which is the best for one width (tr M S tr M^-1 H at its least), and
rotated, so that each has the group's mean energy and nears a Gaussian.

A token has one scale for all its groups, whose ratios are fixed by calibration; it is stored as the logarithm, in
sixteenths of an octave: that of the least cost for the codes nearest under the rms, rounded, with codes then chosen
anew. The mean of a page has 8 bits a channel: what its rounding leaves is quantised with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kv4._core import PAGE_TOKENS
from kv4.evaluate.fake import _level, _nearest, fp16
from kv4.evaluate.rotations import rotation
from kv4.evaluate.widths import Group, table

Tensor = torch.Tensor
SEED = 0x6D6978  # of the rotations inside groups
_FLOOR = 1e-9  # of the largest eigenvalue
_OCTAVES = 8  # scales reach from 2^-8 to 2^8 of the calibrated ones


@dataclass
class Basis:
    """One side of one layer, float64. forward [heads, d, d]: T with x = T k; inverse: T^-1. sigma [heads, groups]: rms
    of a group's channels; weight [heads, groups]: what a squared error costs there, twice."""

    forward: Tensor
    inverse: Tensor
    sigma: Tensor
    weight: Tensor

    @property
    def group(self) -> int:
        return self.forward.shape[-1] // self.sigma.shape[-1]


def _power(x: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    values = values.clamp(min=_FLOOR * values.amax(-1, keepdim=True).clamp(min=1e-30))
    return vectors @ (values**exponent)[..., None].mul(vectors.mT)


def make_basis(cost: Tensor, energy: Tensor, group: int) -> tuple[Basis, list[Group]]:
    """The basis of H = `cost` and S = `energy`, symmetric positive definite [heads, d, d], and its groups, head after
    head. Errors: ValueError for a group that does not divide d."""
    heads, d, _ = cost.shape
    if group < 2 or group % 2 or d % group:
        raise ValueError(f"group: expected an even divisor of the head dim {d}; got {group}")
    root, inverse = _power(cost.double(), 0.5), _power(cost.double(), -0.5)
    values, vectors = torch.linalg.eigh(root @ energy.double() @ root)
    values, vectors = values.flip(-1), vectors.flip(-1)
    values = values.clamp(min=_FLOOR * values.amax(-1, keepdim=True).clamp(min=1e-30))
    weights = values**-0.25
    turn = torch.block_diag(*(torch.from_numpy(rotation("srft", group, SEED + i)) for i in range(d // group)))
    forward = turn @ (weights[..., None] * (vectors.mT @ root))
    back = (inverse @ vectors) / weights[:, None] @ turn.mT
    by_group = values.view(heads, d // group, group)
    weight = weights.view_as(by_group).pow(-2).mean(-1)
    mean_energy = by_group.sqrt().mean(-1)  # of values * weights^2
    groups = [
        Group(float(group * e * w) / 2, float(v) / 2)
        for e, w, v in zip(mean_energy.flatten(), weight.flatten(), by_group.sum(-1).flatten(), strict=True)
    ]
    return Basis(forward, back, mean_energy.sqrt(), weight), groups


def lightest(value: Tensor, count: int, page: int = PAGE_TOKENS) -> Tensor:
    """Places [heads, pages, count] of the tokens with the least |v| in every whole page of value [heads, T, d]. Tokens
    on which attention rests where nothing is to be read have small values and keys that most queries see (Xiao et al.,
    Efficient streaming language models with attention sinks, 2024); they stand for most of the loss where there are
    any, and this finds them from the page alone."""
    pages = value.shape[1] // page
    norms = value[:, : pages * page].double().norm(dim=-1).unflatten(-1, (pages, page))
    return norms.topk(count, -1, largest=False).indices.sort(-1).values


def set_aside(key: Tensor, places: Tensor, page: int = PAGE_TOKENS) -> Tensor:
    """Keys [heads, T, d] with the mean of their page's other tokens at `places`."""
    heads, pages, _ = places.shape
    whole = key[:, : pages * page].unflatten(1, (pages, page))
    kept = torch.ones(heads, pages, page, 1, dtype=key.dtype).scatter(2, places[..., None], 0)
    mean = (whole * kept).sum(2, keepdim=True) / kept.sum(2, keepdim=True)
    return torch.cat([(whole * kept + mean * (1 - kept)).flatten(1, 2), key[:, pages * page :]], 1)


def put_back(read: Tensor, rows: Tensor, about: Tensor | None, places: Tensor, page: int = PAGE_TOKENS) -> Tensor:
    """`read` [heads, T, d] with the rows at `places` as 8 bits a channel and an fp16 step hold them: their difference
    from `about` (what is read there now), or from 0."""
    pages = places.shape[1]
    at = (places + page * torch.arange(pages)[None, :, None]).flatten(1)[..., None].expand(-1, -1, rows.shape[-1])
    base = 0.0 if about is None else about.gather(1, at)
    apart = rows.gather(1, at) - base
    return read.scatter(1, at, base + _in_bytes(apart))


def _in_bytes(x: Tensor) -> Tensor:
    """x [..., n] as 8 bits an element and an fp16 step hold it."""
    step = fp16(x.abs().amax(-1, keepdim=True) / 127)
    return torch.where(step > 0, (x / step.clamp(min=1e-30)).round().clamp(-127, 127), 0.0) * step


def _page_means(x: Tensor, group: int, page: int) -> Tensor:
    """Means of pages of x [heads, T, d] as stored, for every token."""
    means = torch.stack([x[:, a : a + page].mean(1) for a in range(0, x.shape[1], page)], 1)
    stored = _in_bytes(means.unflatten(-1, (-1, group)))
    return stored.flatten(-2).repeat_interleave(page, 1)[:, : x.shape[1]]


def _log_rounded(scale: Tensor) -> Tensor:
    """The nearest of 2^(i/16) within the octaves that 8 bits reach; 0 stays 0."""
    exponent = (16 * scale.clamp(min=1e-30).log2()).round().clamp(-16 * _OCTAVES + 1, 16 * _OCTAVES - 1)
    return torch.where(scale > 0, torch.exp2(exponent / 16), 0.0)


def seal_mixed(rows: Tensor, basis: Basis, widths: Tensor, *, mean: bool, page: int = PAGE_TOKENS) -> Tensor:
    """rows [heads, T, d] as read back, pages counted from the first. widths int64 [heads, groups]. In float64."""
    group = basis.group
    x = rows.double() @ basis.forward.mT
    stored = _page_means(x, group, page) if mean else torch.zeros_like(x)
    y = (x - stored).unflatten(-1, (-1, group)) / basis.sigma[:, None, :, None]
    kept = (widths > 0).double()[:, None, :, None]
    channels = (group * kept.sum(2, keepdim=True)).clamp(min=1)
    scale = _log_rounded(((y.square() * kept).sum((-1, -2), keepdim=True) / channels).sqrt())
    level = _levels_of(y / scale.clamp(min=1e-30), widths)
    cost = (basis.weight * basis.sigma.square())[:, None, :, None]
    fit = (cost * y * level).sum((-1, -2), keepdim=True)
    scale = _log_rounded((fit / (cost * level.square()).sum((-1, -2), keepdim=True).clamp(min=1e-30)).clamp(min=0))
    # Codes are those nearest under the scale as stored: its rounding is then no error of its own.
    level = _levels_of(y / scale.clamp(min=1e-30), widths)
    back = (scale * basis.sigma[:, None, :, None] * level).flatten(-2) + stored
    return (back @ basis.inverse.mT).to(rows.dtype)


def _levels_of(y: Tensor, widths: Tensor) -> Tensor:
    """The level nearest to y [heads, T, groups, channels] in the table of its group's width; 0 where that is 0."""
    found = torch.zeros_like(y)
    for head in range(y.shape[0]):
        for bits in widths[head].unique().tolist():
            if bits:
                chosen, levels = widths[head] == bits, table(bits)
                codes = _nearest(y[head][:, chosen] * levels.gain, levels)
                found[head][:, chosen] = _level(codes, levels, y.dtype) / levels.gain
    return found
