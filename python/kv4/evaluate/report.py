"""Tables of quality in Markdown; the same cells serve the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

HEADER = ("recipe", "KL", "median", "99 %", "99.9 %", "top-1", "dPPL", "bytes, fp16 / it")
ABLATION = ("row", "bits", "KL", "less kv4's", "top-1", "dPPL", "MSE K", "MSE V", "MSE q.k")

PREDICTION = ("row", "bits", "KL of keys", "KL of values", "both")


def prediction_cells(p: Any) -> tuple[str, ...]:
    """One line of PREDICTION."""
    return (p.row.label, f"{p.bits_per_value:.3f}", f"{p.key:.5f}", f"{p.value:.5f}", f"{p.key + p.value:.5f}")


def with_error(value: float, error: float, form: str) -> str:
    """A figure and its standard error in brackets, none where there is none."""
    return format(value, form) if isnan(error) else f"{value:{form}} ({error:{form.lstrip('+')}})"


def quality_cells(name: str, q: Any) -> tuple[str, ...]:
    """One line of HEADER."""
    return (
        name,
        with_error(q.kl, q.kl_se, ".4f"),
        f"{q.kl_median:.4f}",
        f"{q.kl_p99:.4f}",
        f"{q.kl_p999:.4f}",
        with_error(q.top1, q.top1_se, ".4f"),
        percent(q.dppl, q.dppl_se),
        f"{q.fp16_bytes / q.cache_bytes:.2f}" if q.cache_bytes else "",
    )


def percent(value: float, error: float) -> str:
    """A change of perplexity; beyond tenfold in times."""
    if value > 10:
        return f"x {value + 1:,.0f}"
    return with_error(100 * value, 100 * error, "+.2f") + " %"


def ablation_cells(result: Any) -> tuple[str, ...]:
    """One line of ABLATION."""
    q, e = result.quality, result.errors
    return (
        result.row.label,
        f"{result.bits_per_value:.3g}" if result.bits_per_value >= 10 else f"{result.bits_per_value:.3f}",
        with_error(q.kl, q.kl_se, ".4f"),
        with_error(*result.difference, "+.4f") if result.difference else "",
        f"{q.top1:.4f}",
        percent(q.dppl, q.dppl_se),
        f"{e.key:.4f}",
        f"{e.value:.4f}",
        f"{e.score:.4f}",
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(header)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def heat_table(cells: Sequence[Any]) -> list[str]:
    """Passkeys found by each cache at each length."""
    lengths = sorted({cell.length for cell in cells})
    lines = []
    for cache in dict.fromkeys(cell.cache for cell in cells):
        found: Mapping[int, list[Any]] = {n: [c for c in cells if (c.cache, c.length) == (cache, n)] for n in lengths}
        lines.append([cache, *(f"{sum(c.found for c in here)} of {len(here)}" for here in found.values())])
    return markdown(["cache", *(f"{n:,} tokens" for n in lengths)], lines)
