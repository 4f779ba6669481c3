"""Tables of quantisation levels for any number of bits, symmetric about 0.

4-bit `lloyd_max` and `uniform` are the core's own (src/recipe/levels.cpp). The others are made by the same
definitions: S. P. Lloyd, Least squares quantization in PCM, IEEE Trans. IT 28, 1982, and J. Max, Quantizing for
minimum distortion, IRE Trans. IT 6, 1960, both for a unit Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import numpy as np

from kv4 import _core
from kv4.recipe import PACKED_WIDTHS, Side

KINDS = ("lloyd_max", "uniform", "cubic")


@dataclass(frozen=True)
class Levels:
    """magnitude: ascending, >= 0; the levels are plus and minus these. A magnitude 0 makes the table odd (mid-tread).
    gain: levels per standard deviation of a Gaussian that the levels are made for."""

    magnitude: tuple[float, ...]
    gain: float

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Midpoints of neighbouring magnitudes: a value on one takes the larger."""
        return tuple((a + b) / 2 for a, b in pairwise(self.magnitude))


@lru_cache
def levels(kind: str, bits: int) -> Levels:
    """The table of 2^bits levels, or 2^bits - 1 for `uniform` and for more than 6 bits; those of `lloyd_max` are
    integers that fit int8, as kernels hold them. `cubic`: a u + b u^3 at evenly spaced u, the a : b and gain of least
    squared error on a Gaussian, so that a kernel needs no table. Errors: ValueError."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8; got {bits}")
    if kind == "uniform":
        top = 2 ** (bits - 1) - 1
        steps = tuple(float(i) for i in range(top + 1))
        return Levels(steps, 2.829564 if bits == 4 else _best_gain(np.array(steps)))
    if kind == "lloyd_max":
        if bits == 4:
            return Levels((6.0, 18.0, 31.0, 44.0, 58.0, 75.0, 96.0, 127.0), 46.48)
        if bits > 6:  # as integers some of the best levels would fall together: even ones, to 4.5 deviations
            top = 2 ** (bits - 1) - 1
            return Levels(tuple(float(i) for i in range(top + 1)), top / 4.5)
        best = np.array(_lloyd_max(2 ** (bits - 1)))
        whole = np.round(127 / best[-1] * best)
        return Levels(tuple(float(x) for x in whole), _best_gain(whole))
    if kind == "cubic":
        return _cubic(bits)
    raise ValueError(f"levels: expected one of {', '.join(KINDS)}; got {kind!r}")


def step_rule(kind: str, bits: int, scale: str, width: int) -> tuple[bool, float]:
    """(by the largest, factor): codes of a group of `width` values x are the levels nearest to x / step, where step is
    factor * max |x|, or factor * rms(x). The core's own tables have its rule (src/recipe/levels.cpp); others go by the
    rms. scale: "least_squares", "rms" or "abs_max"."""
    if kind == "trellis" and bits > 4:
        kind = "lloyd_max"
    if kind == "trellis":
        return _core.step_rule(Side(levels=kind, bits=bits), width)
    table = levels(kind, bits)
    if scale == "rms":
        return False, 1 / table.gain
    if (kind == "lloyd_max" and bits in PACKED_WIDTHS) or (kind == "uniform" and bits == 4):
        return _core.step_rule(Side(levels=kind, bits=bits, scale=scale), width)
    return (True, 1 / table.magnitude[-1]) if scale == "abs_max" else (False, 1 / table.gain)


def _mass(a: float, b: float) -> float:
    return (erf(b / sqrt(2)) - erf(a / sqrt(2))) / 2


def _density(x: float) -> float:
    return 0.0 if x == inf else exp(-x * x / 2) / sqrt(2 * pi)


def _lloyd_max(count: int) -> list[float]:
    """The positive levels of the 2 * count level optimum: each the mean of a Gaussian over its cell."""
    found = [(i + 0.5) * 3 / count for i in range(count)]
    for _ in range(20000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(found)), inf]
        cells = list(pairwise(edges))
        new = [(_density(a) - _density(b)) / _mass(a, b) for a, b in cells]
        change = max(abs(a - b) for a, b in zip(new, found, strict=True))
        found = new
        if change < 1e-12:
            break
    return found


def _distortion(magnitude: np.ndarray, gain: float) -> float:
    """Mean squared error of a unit Gaussian x quantised as the level nearest to gain x, over gain."""
    found = magnitude / gain
    edges = np.concatenate([[0.0], (found[1:] + found[:-1]) / 2, [inf]])
    total = 0.0
    for level, a, b in zip(found, edges, edges[1:], strict=False):
        mass, first = _mass(a, b), _density(a) - _density(b)
        second = mass + a * _density(a) - (0.0 if b == inf else b * _density(b))
        total += 2 * (second - 2 * level * first + level * level * mass)
    return total


def _best_gain(magnitude: np.ndarray) -> float:
    low, high = magnitude[-1] / 8, magnitude[-1] / 1.0
    for _ in range(200):  # golden section: the distortion has one minimum in the gain
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, b) if _distortion(magnitude, a) < _distortion(magnitude, b) else (a, high)
    return float((low + high) / 2)


def _cubic(bits: int) -> Levels:
    count = 2 ** (bits - 1)
    u = (np.arange(count) + 0.5) / count
    best: tuple[float, Levels] | None = None
    for share in np.linspace(0, 1, 101):
        magnitude = (1 - share) * u + share * u**3
        gain = _best_gain(magnitude)
        error = _distortion(magnitude, gain)
        if best is None or error < best[0]:
            best = error, Levels(tuple(float(m) for m in magnitude), gain)
    assert best is not None
    return best[1]
