"""A plot of attention time against context, with the machine's roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Solid lines: measured. Dashed lines: bytes over read bandwidth.
_COLOURS = {"kv4 int4": "#1f77b4", "kv4 exact fp16": "#d98c2b", "sdpa bf16": "#8a8f98", "sdpa fp32": "#444444"}
_ROOFS = {"kv4 int4": "int4 roofline", "kv4 exact fp16": "fp16 roofline"}


def attention(rows: Sequence[Any], path: Path, title: str) -> None:
    """Microseconds per layer and decoded token over tokens in the cache, one panel per geometry."""
    from matplotlib.figure import Figure

    geometries = list(dict.fromkeys(row.geometry for row in rows))
    columns = min(2, len(geometries))
    lines = -(-len(geometries) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    panels = iter(figure.subplots(lines, columns, squeeze=False).flat)
    for geometry, axes in zip(geometries, panels, strict=False):
        here = [row for row in rows if row.geometry == geometry]
        for name, colour in _COLOURS.items():
            line = sorted((row for row in here if row.candidate == name), key=lambda row: row.tokens)
            tokens = [row.tokens for row in line]
            axes.loglog(tokens, [1e6 * row.seconds for row in line], "o-", color=colour, label=name)
            if name in _ROOFS:
                floor = [1e6 * row.bytes_read / row.read_bandwidth for row in line]
                axes.loglog(tokens, floor, "--", color=colour, alpha=0.6, label=_ROOFS[name])
        first = here[0]
        axes.set_title(
            f"{geometry}: {first.q_heads} query, {first.kv_heads} KV heads, d = {first.head_dim}",
            loc="left", fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("microseconds per layer")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
