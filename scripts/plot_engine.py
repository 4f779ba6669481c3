"""Plots what `kv4-run bench --json` printed: plot_engine.py BENCH.json PICTURE.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: Path, picture: Path) -> None:
    data = json.loads(source.read_text(encoding="utf-8"))
    caches = list(dict.fromkeys(row["cache"] for row in data["rows"]))
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for cache in caches:
        rows = [row for row in data["rows"] if row["cache"] == cache]
        own = not cache.startswith("llama.cpp")
        axes.plot(
            [row["depth"] for row in rows],
            [row["ms_per_token"] for row in rows],
            marker="o",
            linewidth=2.5 if own else 1.5,
            linestyle="-" if own else "--",
            label=cache,
        )
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{Path(data['model']).stem}, {data['threads']} threads")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} BENCH.json PICTURE.png")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
