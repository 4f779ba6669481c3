"""How many bits each of many parts gets under a budget.

With one Lagrange multiplier for all parts the loss is least where every part's last bit buys the same (reverse
water-filling; Cover and Thomas, Elements of Information Theory, 2006, section 10.3.3). Widths are whole here, so steps
are taken along each part's lower convex hull, the one that buys most per bit first (Shoham and Gersho, IEEE Trans. ASSP
36(9), 1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

WIDTHS = (2, 3, 4, 5, 6, 8)


def allocate(losses: Sequence[Sequence[float]], budget: float, widths: Sequence[int] = WIDTHS) -> list[int]:
    """The bits of each part, of which losses has what it loses at every one of `widths`: their sum is at most `budget`,
    and no step of any part that buys something and still fits is left out. Errors: ValueError for a budget below the
    least width of every part, or widths out of order."""
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths: expected some, ascending; got {tuple(widths)}")
    left = budget - widths[0] * len(losses)
    if left < 0:
        raise ValueError(f"budget: expected at least {widths[0] * len(losses)} bits; got {budget:g}")
    found = [0] * len(losses)  # places in widths
    waiting: list[tuple[float, int, int]] = []

    def gain(part: int, place: int) -> float:
        now = found[part]
        return (losses[part][now] - losses[part][place]) / (widths[place] - widths[now])

    def offer(part: int) -> None:
        """The next step along the part's convex hull, of those that fit."""
        now = found[part]
        fits = [i for i in range(now + 1, len(widths)) if widths[i] - widths[now] <= left]
        steps = [(gain(part, i), i) for i in fits]
        if steps and max(steps)[0] > 0:
            best, place = max(steps)
            heapq.heappush(waiting, (-best, part, place))

    for part in range(len(losses)):
        offer(part)
    while waiting:
        _, part, place = heapq.heappop(waiting)
        cost = widths[place] - widths[found[part]]
        if cost <= left:
            left -= cost
            found[part] = place
        offer(part)  # the next step, or a shorter one where this no longer fits
    return [widths[place] for place in found]
