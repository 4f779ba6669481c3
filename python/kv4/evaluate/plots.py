"""Pictures of quality."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#1f77b4", "#d98c2b", "#8a8f98", "#7a4fa3", "#3c8d5a", "#b5443c")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def divergence(results: Mapping[str, Any], path: Path, title: str) -> None:
    """The share of tokens above each KL divergence, one line per recipe (Quality by name)."""
    import numpy as np

    figure = _figure(7, 4)
    axes = figure.subplots()
    for index, (name, quality) in enumerate(results.items()):
        kl = np.sort(np.concatenate([scores.kl for scores in quality.scores]))[::-1]
        share = (np.arange(len(kl)) + 1) / len(kl)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.loglog(np.maximum(kl, 1e-7), share, color=colour, label=f"{name}: mean {quality.kl:.4f}")
    axes.set_xlabel("KL divergence of a token, nats")
    axes.set_ylabel("share of tokens above")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    _save(figure, path)


def by_bits(points: Sequence[tuple[str, float, float, float]], path: Path, title: str) -> None:
    """(label, bits a value, KL, its standard error) of each cache: budgets of one kind, whose labels differ in a number
    alone, as a line, others as points."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    kinds = [re.sub(r"(?<= )[0-9.]+(?=,|$)", "#", label) for label, *_ in points]
    budgets = [kind for kind in dict.fromkeys(kinds) if "#" in kind]
    for index, kind in enumerate(budgets):
        line = sorted(point[1:3] for point, own in zip(points, kinds, strict=True) if own == kind)
        axes.plot([bits for bits, _ in line], [kl for _, kl in line], color=_COLOURS[index % 2 * 3], linewidth=1)
    for (label, bits, kl, error), kind in zip(points, kinds, strict=True):
        own = label.startswith("kv4")
        colour = _COLOURS[budgets.index(kind) % 2 * 3] if kind in budgets else _COLOURS[1] if own else _COLOURS[2]
        axes.errorbar(bits, kl, yerr=0 if error != error else error, fmt="o", color=colour, markersize=5)
        # Below the point where another, just above it, has its label there.
        covered = any(abs(x - bits) < 0.5 and kl < y < 1.4 * kl for _, x, y, _ in points)
        axes.annotate(label, (bits, kl), xytext=(5, -11 if covered else 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits a value, scales, means and refined keys included")
    axes.set_ylabel("KL divergence, nats per token")
    axes.set_title(title, loc="left", fontsize=10)
    _plain(axes)
    _save(figure, path)


def table(rows: Sequence[tuple[str, str, float, float]], path: Path, title: str) -> None:
    """Bars of KL divergence: (group, label, KL, standard error) from top to bottom."""
    figure = _figure(8, 1 + 0.22 * len(rows))
    axes = figure.subplots()
    groups = list(dict.fromkeys(row[0] for row in rows))
    for place, (group, _, kl, error) in enumerate(rows):
        colour = _COLOURS[groups.index(group) % len(_COLOURS)]
        axes.barh(place, kl, xerr=0 if error != error else error, color=colour, height=0.7, ecolor="#444444")
    axes.set_yticks(range(len(rows)), [row[1] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence, nats per token")
    axes.set_title(title, loc="left", fontsize=10)
    _plain(axes)
    _save(figure, path)


def heat_map(cells: Sequence[Any], path: Path, title: str) -> None:
    """Probability of the passkey over length and depth, one panel per cache; a cross marks what greedy decoding
    misses."""
    caches = list(dict.fromkeys(cell.cache for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    figure = _figure(1.5 + 2.6 * len(caches), 3.2)
    panels = figure.subplots(1, len(caches), sharey=True, squeeze=False)[0]
    image = None
    for axes, cache in zip(panels, caches, strict=True):
        here = {(cell.length, cell.depth): cell for cell in cells if cell.cache == cache}
        grid = [[here[length, depth].probability for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                if not here[length, depth].found:
                    axes.text(j, i, "x", ha="center", va="center", color="white", fontsize=9)
        hits = sum(cell.found for cell in here.values())
        axes.set_title(f"{cache}: {hits} of {len(here)}", loc="left", fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the passkey")
    figure.colorbar(image, ax=list(panels), label="probability of a digit", fraction=0.04)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def energy(models: Mapping[str, Sequence[Any]], path: Path, title: str) -> None:
    """Per layer: the share of key energy in the page means, and the error of a score under both recipes."""
    figure = _figure(4.6 * len(models), 6)
    panels = figure.subplots(2, len(models), squeeze=False)
    for (name, rows), top, bottom in zip(models.items(), *panels, strict=True):
        layers = [row.layer for row in rows]
        top.bar(layers, [100 * row.page_mean for row in rows], color=_COLOURS[0], label="means of pages of 64")
        top.plot(layers, [100 * row.mean for row in rows], "o", color=_COLOURS[1], markersize=3, label="mean of all")
        top.set_title(f"{name}: largest channel mean {max(row.largest for row in rows):.0f}", loc="left", fontsize=10)
        top.set_ylim(0, 100)
        bottom.semilogy(layers, [row.paper for row in rows], "o-", color=_COLOURS[5], markersize=3, label="paper")
        bottom.semilogy(layers, [row.kv4 for row in rows], "o-", color=_COLOURS[0], markersize=3, label="kv4")
        bottom.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
        bottom.set_xlabel("layer")
        for axes in (top, bottom):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, fontsize=8)
            _plain(axes)
    panels[0][0].set_ylabel("key energy in the mean, %")
    panels[1][0].set_ylabel("error of a score, nats (rms)")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)
