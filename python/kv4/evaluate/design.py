"""From a calibration text to a basis for every layer and widths for every budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kv4._core import PAGE_TOKENS
from kv4.calibration import Calibration
from kv4.evaluate.mixed import Basis, lightest, make_basis
from kv4.evaluate.sensitivity import SINKS, Rows, sensitivities
from kv4.evaluate.widths import WIDTHS, Group, allocate, overhead
from kv4.recipe import Recipe

Tensor = torch.Tensor
BUDGETS = (2.5, 3.25, 4.25)


@dataclass(frozen=True)
class Design:
    """What is chosen once for all models; other values are for ablation.

    group: channels that share a width.
    cost: what errors are weighed by: "root", gradients g over |g|^(1/2), so that a few tokens do not stand for all;
        "fisher", g itself; "query": the queries' second moments for keys and nothing for values, without gradients.
    damping: share of a prior in it: queries' moments for keys, the identity for values.
    share: what has one budget: "model", "layer" or "side", keys or values of a layer.
    heads: "pooled" has one basis for all KV heads of a layer.
    escapes: tokens a page in 8 bits. None: 1 where the tokens of least |v|, 1 in 64, have more than a sixth of the
        squared gradients, for they take 0.13 bits, which are 17 % of a loss; else 0.
    """

    group: int = 16
    cost: Literal["root", "fisher", "query"] = "root"
    damping: float = 0.1
    share: Literal["model", "layer", "side"] = "model"
    widths: tuple[int, ...] = WIDTHS
    heads: Literal["own", "pooled"] = "own"
    escapes: int | None = None

    def __post_init__(self) -> None:
        known_by_name = {
            "cost": ("root", "fisher", "query"), "share": ("model", "layer", "side"), "heads": ("own", "pooled"),
        }  # fmt: skip
        for name, known in known_by_name.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping: expected 0 to 1; got {self.damping}")
        if self.escapes not in (None, 0, 1, 2, 4):
            raise ValueError(f"escapes: expected 0, 1, 2 or 4; got {self.escapes}")


@dataclass
class Moments:
    """Of one layer, float64 [kv_heads, d, d], summed over windows: `cost` and `energy` for "key" and "value"; query:
    E q q^T."""

    query: Tensor
    cost: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-30)


def moments(rows: Rows, escapes: int, cost: str) -> Moments:
    """Tokens that escape, and those of no whole page, are left out."""
    key, value = (x[:, SINKS:].double() for x in (rows.key, rows.value))
    heads, tokens, d = key.shape
    pages = tokens // PAGE_TOKENS
    sealed = slice(0, pages * PAGE_TOKENS)
    kept = torch.ones(heads, pages, PAGE_TOKENS, dtype=torch.float64)
    if escapes:
        kept.scatter_(2, lightest(value, escapes), 0)
    whole = key[:, sealed].unflatten(1, (pages, PAGE_TOKENS))
    mean = (whole * kept[..., None]).sum(2, keepdim=True) / kept.sum(2)[..., None, None]
    mask = kept.flatten(1)[..., None]
    stored = {"key": (whole - mean).flatten(1, 2) * mask, "value": value[:, sealed] * mask}
    query = rows.query.double().reshape(heads, -1, d)
    found = Moments(query.mT @ query / query.shape[1])
    gradients = {"key": rows.key_gradient, "value": rows.value_gradient}
    for side, x in stored.items():
        g = gradients[side][:, sealed].double() * mask
        found.energy[side] = x.mT @ x / x.shape[1]
        # What it costs altogether: a token's error has its own scale.
        share = x.square().sum(-1, keepdim=True) / x.square().sum((-1, -2), keepdim=True).clamp(min=1e-30) * x.shape[1]
        weighed = g * share.sqrt()
        whole_cost = _trace(weighed.mT @ weighed)
        if cost == "query":
            form = found.query if side == "key" else torch.eye(d, dtype=torch.float64).expand(heads, d, d)
        else:
            h = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-30).sqrt() if cost == "root" else weighed
            form = h.mT @ h
        found.cost[side] = form / _trace(form) * whole_cost
    return found


def share_of_lightest(windows: Sequence[Sequence[Rows]]) -> float:
    """Of the squared gradients of keys, the share of the token of least |v| in each page."""
    light = total = 0.0
    for layers in windows:
        for rows in layers:
            places = lightest(rows.value[:, SINKS:], 1)
            heads, pages, _ = places.shape
            g = rows.key_gradient[:, : pages * PAGE_TOKENS].double().square().sum(-1).view(heads, pages, PAGE_TOKENS)
            light += float(g.gather(2, places).sum())
            total += float(g.sum())
    return light / max(total, 1e-300)


def design(
    model: Any,
    windows: Sequence[Tensor],
    *,
    bits: Sequence[float] = BUDGETS,
    options: Design | None = None,
    identity: dict[str, Any] | None = None,
    text: str = "",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Measures a model on windows of ids [1, T]; the calibration has a basis per layer, KV head and side, and widths
    for each of `bits`, all-in per value. Errors: ValueError."""
    if not windows:
        raise ValueError("windows: expected at least 1; got 0")
    taken = []
    for seed, ids in enumerate(windows):
        taken.append(sensitivities(model, ids, seed))
        if progress:
            progress(ids.shape[1])
    tokens = sum(ids.shape[1] for ids in windows)
    return design_from(taken, bits=bits, options=options, identity=identity, text=text, tokens=tokens)


def design_from(
    windows: Sequence[Sequence[Rows]],
    *,
    bits: Sequence[float] = BUDGETS,
    options: Design | None = None,
    identity: dict[str, Any] | None = None,
    text: str = "",
    tokens: int = 0,
) -> Calibration:
    """`design` from what is already measured."""
    options = options or Design()
    escapes = options.escapes
    if escapes is None:
        escapes = int(share_of_lightest(windows) > 1 / 6)
    tensors: dict[str, Tensor] = {}
    sides: list[tuple[str, Basis, list[Group]]] = []
    for index in range(len(windows[0])):
        parts = [moments(layers[index], escapes, options.cost) for layers in windows]
        query = torch.stack([p.query for p in parts]).mean(0)
        for side in ("key", "value"):
            cost, energy = (torch.stack([getattr(p, of)[side] for p in parts]).mean(0) for of in ("cost", "energy"))
            prior = query if side == "key" else torch.eye(cost.shape[-1], dtype=torch.float64).expand_as(cost)
            cost = (1 - options.damping) * cost + options.damping * prior / _trace(prior) * _trace(cost)
            if options.heads == "pooled":
                cost, energy = (x.mean(0, keepdim=True).expand_as(x) for x in (cost, energy))
            basis, groups = make_basis(cost, energy, options.group)
            name = f"layer.{index}.{side}"
            sides.append((name, basis, groups))
            tensors |= {f"{name}.basis": basis.forward, f"{name}.sigma": basis.sigma, f"{name}.weight": basis.weight}
    for name, widths in budgeted(sides, bits, options, escapes).items():
        tensors[f"{name}.widths"] = widths
    return Calibration(
        tensors={name: x.float() for name, x in tensors.items()}, recipe=Recipe(), model=identity or {}, text=text,
        tokens=tokens, method="mixed", budgets=tuple(bits), escapes=escapes,
    )  # fmt: skip


def budgeted(
    sides: Sequence[tuple[str, Basis, list[Group]]], bits: Sequence[float], options: Design, escapes: int
) -> dict[str, Tensor]:
    """Widths [budgets, heads, groups] by the names of sides, which come as keys and values of one layer after another.
    Errors: ValueError for a budget that the widths cannot keep."""
    found: dict[str, list[Tensor]] = {name: [] for name, _, _ in sides}
    together = {"model": len(sides), "layer": 2, "side": 1}[options.share]
    for budget in bits:
        for first in range(0, len(sides), together):
            some = sides[first : first + together]
            left = sum(_codes(budget, basis, options.group, escapes) for _, basis, _ in some)
            try:
                widths, _ = allocate([g for _, _, groups in some for g in groups], left, options.widths)
            except ValueError as error:
                raise ValueError(f"bits: expected a budget for such groups; got {budget} ({error})") from None
            for name, basis, groups in some:
                found[name].append(torch.tensor(widths[: len(groups)]).view(basis.sigma.shape))
                widths = widths[len(groups) :]
    return {name: torch.stack(parts) for name, parts in found.items()}


def _codes(budget: float, basis: Basis, group: int, escapes: int) -> float:
    """Bits of codes that `budget` a value leaves a token's groups of one side, over the channels of a group. Half of
    what a page has beside its codes is each side's."""
    heads, d, _ = basis.forward.shape
    beside = overhead(d, d, group, escapes) / 2 / PAGE_TOKENS
    return heads * (budget * d - beside) / group


def bits_per_value(calibration: Calibration, budget: float) -> float:
    """What a calibration's pages take, counted from its widths: mean over keys and values of all layers."""
    total = values = 0.0
    for name in calibration.tensors:
        if not name.endswith(".widths"):
            continue
        layer, side = int(name.split(".")[1]), name.split(".")[2]
        basis, widths = calibration.mixed_of(side, layer, budget)
        heads, d, _ = basis.shape
        group = d // widths.shape[-1]
        total += group * float(widths.sum()) + heads * overhead(d, d, group, calibration.escapes) / 2 / PAGE_TOKENS
        values += heads * d
    return total / values
