#!/usr/bin/env python3
"""docs/decode.svg, the README's picture, from the first table of docs/results.md: ms per decoded token against the
tokens in the cache, and the bytes that the cache takes less."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODEL = "Qwen2.5-Coder 1.5B"
OWN, KV4 = "#888888", "#c2410c"


def rows_of(text: str, model: str) -> list[list[float]]:
    """(tokens, own ms, kv4 ms, fp16 bytes / kv4 bytes) of one model in the first table."""
    found: list[list[float]] = []
    at = ""
    for line in text.split("\n\n## ")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 7 or not re.fullmatch(r"[\d,]+", cells[1]):
            continue
        at = cells[0] or at
        if at == model:
            numbers = [float(cell.replace(",", "")) for cell in cells[1:]]
            found.append([numbers[0], numbers[1], numbers[3], numbers[5]])
    return found


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "kv4", "font.size": 10, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    rows = rows_of((DOCS / "results.md").read_text(encoding="utf-8"), MODEL)
    assert len(rows) >= 3, f"the first table of docs/results.md: expected rows of {MODEL}; got {len(rows)}"
    tokens = [f"{int(row[0]):,}" for row in rows]
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    time, size = figure.subplots(1, 2, width_ratios=(3, 2))
    for column, label, colour in ((1, "transformers' DynamicCache", OWN), (2, "kv4", KV4)):
        time.plot(tokens, [row[column] for row in rows], marker="o", color=colour, label=label)
    time.annotate(f"{rows[-1][1]:.0f} ms", (3, rows[-1][1]), (-6, 2), textcoords="offset points", ha="right")
    time.annotate(f"{rows[-1][2]:.0f} ms", (3, rows[-1][2]), (0, -14), textcoords="offset points", ha="center")
    time.set(ylim=(0, None), xlabel="tokens in the cache", ylabel="ms per decoded token", title=f"{MODEL}, 2 CPU cores")
    time.legend(frameon=False, loc="upper left")
    bars = size.bar(tokens, [row[3] for row in rows], color=KV4, width=0.6)
    size.bar_label(bars, fmt="%.2f")
    size.axhline(1, color=OWN, linewidth=1)
    size.set(xlabel="tokens in the cache", ylabel="fp16 bytes / kv4 bytes", title="memory of the cache")
    figure.savefig(DOCS / "decode.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
