"""How many bits each group of channels gets: reverse water-filling under a budget that counts every bit of a page.

A group's expected loss at w bits is its loss at relative error 1 times D(w), the mean squared error of the w-bit table
on a unit Gaussian, and with no bits its whole energy. With one Lagrange multiplier for all groups the loss is least
where every group's last bit buys the same (reverse water-filling; Cover and Thomas, Elements of Information Theory,
2006, section 10.3.3). Widths are whole here, so steps are taken along each group's lower convex hull, the one that buys
most per bit first (Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kv4._core import PAGE_TOKENS
from kv4.evaluate.levels import Levels, _distortion, levels

WIDTHS = (0, 2, 3, 4, 6, 8)
SCALE_BITS = 8  # of a token: the logarithm of its scale, sixteenths of an octave
MEAN_BITS = 8  # of a channel of a page's key mean, with an fp16 step per group
ESCAPE_BITS = 8  # of a channel of an escaped token, with an fp16 step and its place in the page


@lru_cache
def table(bits: int) -> Levels:
    """Lloyd-Max levels; at 8 bits the integers -127 ... 127, which reach to 6 standard deviations. The best step for a
    Gaussian ends at 3.9: groups of 8 bits are those with the most to lose, and a token whose energy is elsewhere than
    calibration had it would be cut off there."""
    if bits == 8:
        return Levels(tuple(float(i) for i in range(128)), 127 / 6)
    return levels("lloyd_max", bits)


@lru_cache
def distortion(bits: int) -> float:
    """Mean squared error of the table on a unit Gaussian; 1 at no bits."""
    if bits == 0:
        return 1.0
    found = table(bits)
    return float(_distortion(np.array(found.magnitude), found.gain))


def overhead(d_k: int, d_v: int, group: int, escapes: int, page: int = PAGE_TOKENS) -> int:
    """Bits of one head's page beside its codes: scales, the keys' mean, escaped tokens."""
    scales = 2 * SCALE_BITS * page
    mean = MEAN_BITS * d_k + 16 * (d_k // group)
    place = int(np.ceil(np.log2(page)))
    return scales + mean + escapes * (ESCAPE_BITS * (d_k + d_v) + 2 * 16 + place)


@dataclass(frozen=True)
class Group:
    """One group: its expected loss at relative error 1, and with no bits at all."""

    loss: float
    energy: float

    def at(self, bits: int) -> float:
        return self.energy if bits == 0 else self.loss * distortion(bits)


def allocate(groups: list[Group], budget: float, widths: tuple[int, ...] = WIDTHS) -> tuple[list[int], float]:
    """(bits of each group, expected loss): the sum of bits is at most `budget`, and no step of any group that still
    fits is left out. Errors: ValueError for a budget below the least width of every group, or widths out of order."""
    if list(widths) != sorted(set(widths)) or not set(widths) <= set(WIDTHS):
        raise ValueError(f"widths: expected some of {WIDTHS}, ascending; got {widths}")
    left = budget - widths[0] * len(groups)
    if left < 0:
        raise ValueError(f"budget: expected at least {widths[0] * len(groups)} bits; got {budget:g}")
    found = [widths[0]] * len(groups)
    waiting: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        """The next step along the group's convex hull."""
        group, now = groups[index], found[index]
        steps = [((group.at(now) - group.at(w)) / (w - now), w) for w in widths if w > now]
        if steps and max(steps)[0] > 0:
            gain, width = max(steps)
            heapq.heappush(waiting, (-gain, index, width))

    for index in range(len(groups)):
        offer(index)
    while waiting:
        _, index, width = heapq.heappop(waiting)
        cost = width - found[index]
        if cost > left:
            # A shorter step of the same group may fit where the hull's does not.
            fits = [w for w in widths if found[index] < w < width and w - found[index] <= left]
            if not fits:
                continue
            width, cost = fits[-1], fits[-1] - found[index]
        left -= cost
        found[index] = width
        offer(index)
    return found, sum(group.at(bits) for group, bits in zip(groups, found, strict=True))
