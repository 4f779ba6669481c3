"""A recipe to simulate: that of a kv4.Recipe, or one that the core cannot store."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from kv4._core import PAGE_TOKENS
from kv4.evaluate import levels as level_tables
from kv4.evaluate import rotations
from kv4.recipe import MOST_REFINED, PACKED_WIDTHS, Recipe, Side

REFINED_BITS = 4  # of a channel of a second row of codes
BYTES_GROUP = 16  # channels of a mean that share a step where it is stored in bytes


@dataclass(frozen=True)
class SideVariant:
    """One side, keys or values. Fields that kv4.Side has mean the same there.

    rotation: those of kv4.evaluate.rotations, or "given": the matrix of a Calibration, invertible, per KV head.
    bits: 2 to 8, or 16 for a side that is never quantised. group: channels per scale, 0 for the whole vector.
    scale: "rms": as least_squares, but the step follows from a group's rms alone. "search" tries 5 gains around the
        step and keeps the codes whose least-squares fit is best, "search_fine" 15. "affine": levels evenly between a
        group's minimum and maximum, both shrunk towards their middle by what fits best of six shares; fp16 scale and
        zero.
    stored: "fp16" scales and means; "bytes": scales in sixteenths of an octave below the page's largest, which is fp16,
        and means in 8 bits with an fp16 step for 16 channels; codes are those nearest under the scale as stored.
    mean: "page"; "group": one number for `mean_group` neighbouring channels of a page; "none".
    levels: "trellis" has lloyd_max's beyond 4 bits (kv4.evaluate.trellis).
    lambda_: "auto" is the core's estimate from a sequence's first tokens; "window" that of all its tokens (an oracle);
        "given" a Calibration's. shrink: share of the way that "auto" draws energies to their rotary pair's mean.
        damping: exponent of an "auto" lambda.
    rounding: "nearest", or "moment": codes chosen one after another so that the error of q.k under the queries' second
        moments is least, not that of k (keys only; Frantar et al., GPTQ, 2023, with S_q as the Hessian).
    """

    rotation: str = "srft"
    reflectors: int = 0
    seed: int = Side.seed
    bits: int = 4
    group: int = 0
    levels: str = "lloyd_max"
    scale: Literal["least_squares", "rms", "abs_max", "search", "search_fine", "affine"] = "least_squares"
    stored: Literal["fp16", "bytes"] = "fp16"
    mean: Literal["none", "page", "group"] = "none"
    mean_group: int = 16
    lambda_: Literal["none", "auto", "window", "given"] = "none"
    shrink: float = 0.2
    damping: float = 0.9
    rounding: Literal["nearest", "moment"] = "nearest"

    def __post_init__(self) -> None:
        def expect(name: str, known: tuple[str, ...]) -> None:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")

        expect("rotation", (*rotations.KINDS, "given"))
        expect("levels", (*level_tables.KINDS, "trellis"))
        expect("scale", ("least_squares", "rms", "abs_max", "search", "search_fine", "affine"))
        expect("stored", ("fp16", "bytes"))
        expect("mean", ("none", "page", "group"))
        expect("lambda_", ("none", "auto", "window", "given"))
        expect("rounding", ("nearest", "moment"))
        if self.levels == "trellis":
            for name, allowed in (
                ("scale", ("least_squares",)), ("stored", ("fp16",)), ("rounding", ("nearest",)),
            ):  # fmt: skip
                if getattr(self, name) not in allowed:
                    raise ValueError(f"{name}: expected {allowed[0]} with a trellis; got {getattr(self, name)}")
        if self.bits not in (*range(2, 9), 16):
            raise ValueError(f"bits: expected 2 to 8, or 16 for exact; got {self.bits}")

    @property
    def packed_levels(self) -> str:
        """Those that pages have at this width."""
        return "lloyd_max" if self.levels == "trellis" and self.bits > 4 else self.levels

    def bits_per_value(self, d: int, page: int) -> float:
        """Storage of a sealed token: codes, scales and the mean, without what a format of pages would add."""
        if self.bits == 16:
            return 16.0
        mean = {"none": 0.0, "page": 16 / page, "group": 16 / page / self.mean_group}[self.mean]
        scale = (32 if self.scale == "affine" else 16) / (self.group or d)
        if self.stored == "bytes":
            mean *= (8 + 16 / BYTES_GROUP) / 16
            scale = 8 / (self.group or d) + 16 / page / d
        return self.bits + scale + mean


def _up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def _has_pages(side: SideVariant, d: int) -> bool:
    """Whether a page of the packed cache can hold it."""
    return (
        side.bits in PACKED_WIDTHS and side.group % d in (0, 32, 64, 128) and d % (side.group or d) == 0
        and side.scale != "affine"
        and side.stored == "fp16" and side.mean != "group" and side.levels in ("lloyd_max", "uniform", "trellis")
        and (side.bits == 4 or side.levels != "uniform")
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A whole cache's recipe; `Variant()` is kv4's own.

    seal: "page", "arrival" or "never" as in kv4.Recipe; "after": as "arrival", but a query sees its own token exact.
        With "arrival" and "after" a mean is that of the finished page, which no cache could know: only for seeing one
        step of the recipe without the next.
    widths: (bits of keys, bits of values) of every layer, in place of the sides' own; none: theirs in all layers.
    refined: tokens of a page, those of the least |v|, whose keys have a second row of 4-bit codes, for what the first
        left (kv4.evaluate.simulation).
    page: tokens of a page. sinks: exact tokens; chosen "first", or "mass": those that drew most attention when their
        page was sealed, as many per page as `sinks` a sequence (in place of the first ones).
    """

    key: SideVariant = field(default_factory=lambda: SideVariant(mean="page", lambda_="auto"))
    value: SideVariant = SideVariant()
    seal: Literal["page", "arrival", "after", "never"] = "page"
    page: int = PAGE_TOKENS
    sinks: int = 4
    window: int = 64
    chosen: Literal["first", "mass"] = "first"
    widths: tuple[tuple[int, int], ...] = ()
    refined: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self) -> dict[str, Any]:
        """What differs from Variant(): the same for the same variant, also once there are more fields."""
        own, base = self.to_dict(), Variant().to_dict()
        found = {name: value for name, value in own.items() if value != base[name]}
        for side in ("key", "value"):
            if side in found:
                found[side] = {name: value for name, value in own[side].items() if value != base[side][name]}
        return found

    def bits_per_value(self, d_k: int, d_v: int) -> float:
        """Mean over keys and values of a sealed token, as its context grows without end, and over layers: what the
        packed cache takes for a layer that it has pages for, else what its parts take."""
        if self.seal == "never":
            return 16.0
        layers = range(len(self.widths) or 1)
        return sum(self._layer_bits(layer, d_k, d_v) for layer in layers) / len(layers)

    def _layer_bits(self, layer: int, d_k: int, d_v: int) -> float:
        key, value = self.sides_of(layer)
        if all(_has_pages(x, d) for x, d in ((key, d_k), (value, d_v))) and self._has_pages():
            sides = (
                Side(group=x.group % d, bits=x.bits, levels=x.packed_levels, mean=x.mean == "page")
                for x, d in ((key, d_k), (value, d_v))
            )
            return Recipe(*sides, refined=self.refined).bits_per_value(d_k, d_v)
        token = key.bits_per_value(d_k, self.page) * d_k + value.bits_per_value(d_v, self.page) * d_v
        page = self.page * token
        if self.refined:  # second rows, as in a page of the packed cache: src/format/page.h
            scales = 2 * self.refined * (d_k // (key.group or d_k))
            rows = _up(self.refined * REFINED_BITS * d_k // 8, 16) + _up(scales, 16) + self.refined
            page = 8 * _up(math.ceil(page / 8) + rows, 64)
        if self.chosen == "mass" and self.sinks:  # exact copies beside the page, and their places
            page += self.sinks * (16 * (d_k + d_v) + 8)
        return page / (self.page * (d_k + d_v))

    def _has_pages(self) -> bool:
        """Whether the packed cache has pages like these, apart from what their sides hold."""
        marked = self.chosen == "mass" and self.sinks > 0
        return self.page == PAGE_TOKENS and not marked and self.refined <= MOST_REFINED and self.value.mean == "none"

    def sides_of(self, layer: int) -> tuple[SideVariant, SideVariant]:
        """Keys and values of a layer."""
        if not self.widths:
            return self.key, self.value
        key, value = self.widths[layer]
        return dataclasses.replace(self.key, bits=key), dataclasses.replace(self.value, bits=value)

    def replace(self, **changes: Any) -> Variant:
        """A copy; `key__bits=3` changes a field of a side, `both__bits=3` of both."""
        plain = {name: value for name, value in changes.items() if "__" not in name}
        for name, value in changes.items():
            side, _, part = name.partition("__")
            for which in ("key", "value") if side == "both" else (side,):
                if part:
                    plain[which] = dataclasses.replace(plain.get(which, getattr(self, which)), **{part: value})
        return dataclasses.replace(self, **plain)


def from_recipe(recipe: Recipe, head_dim: int | None = None, layers: int = 1) -> Variant:
    """What the core's recipe is as a Variant; head_dim, layers: what a budget's widths follow from. Errors:
    ValueError for a dense rotation, and for a budget without a head dim."""
    widths: tuple[tuple[int, int], ...] = ()
    if recipe.bits is not None:
        if head_dim is None:
            raise ValueError(f"recipe.bits: expected widths, or a head dim that they follow from; got {recipe.bits:g}")
        own = [recipe.at(head_dim, layer=layer, layers=layers) for layer in range(layers)]
        widths = tuple((each.key.bits, each.value.bits) for each in own)

    def side(given: Side) -> SideVariant:
        if given.rotation == "dense":
            raise ValueError("recipe.rotation: expected one that a seed defines; got 'dense'")
        fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        return SideVariant(**{**fields, "mean": "page" if given.mean else "none"})

    key, value = side(recipe.key), side(recipe.value)
    return Variant(
        key, value, recipe.seal, PAGE_TOKENS, recipe.sinks, recipe.window, widths=widths, refined=recipe.refined
    )


def by_layers() -> Variant:
    """The most that widths of layers are simulated with: one key a page refined, lambda of the calibration,
    the best gain of each scale, scales and means in bytes."""
    return Variant(refined=1).replace(key__lambda_="given", both__scale="search_fine", both__stored="bytes")


def q8_0() -> Variant:
    """8 bits, groups of 32 channels with an fp16 abs-max scale, everything as it arrives: like llama.cpp's q8_0."""
    side = SideVariant(rotation="identity", bits=8, group=32, levels="uniform", scale="abs_max")
    return Variant(side, side, seal="arrival", sinks=0, window=0)


def int4_token() -> Variant:
    """4 bits, one abs-max scale a vector, everything as it arrives: what is simplest."""
    side = SideVariant(rotation="identity", bits=4, levels="uniform", scale="abs_max")
    return Variant(side, side, seal="arrival", sinks=0, window=0)


def q4_0() -> Variant:
    """4 bits, groups of 32 channels, a Hadamard rotation: like llama.cpp's q4_0 (15 levels in place of its 16)."""
    side = SideVariant(rotation="srht", bits=4, group=32, levels="uniform", scale="abs_max")
    return Variant(side, side, seal="arrival", sinks=0, window=0)
