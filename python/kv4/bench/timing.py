"""Medians of interleaved repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

Progress = Callable[[str], None]


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.2,
    repeats: int = 7,
) -> dict[str, float]:
    """Median seconds per call.

    Each repeat runs every candidate once, in order, for about `seconds`, so that other load on the
    machine affects all of them alike.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call()
        begin = perf_counter()
        call()
        once = max(perf_counter() - begin, 1e-9)
        counts[name] = max(1, round(seconds / once))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((perf_counter() - begin) / counts[name])
    return {name: median(values) for name, values in times.items()}
