"""`kv4 bench attention --device cuda`."""

from __future__ import annotations

from typing import Any

from kv4.cli import options
from kv4.cli.output import out, progress, table, write_json

GEOMETRIES = "llama-3-8b,qwen2.5-1.5b,gemma-3-270m"


def cases_of(text: str) -> list[tuple[int, int]]:
    """(batch, tokens) of each case of "16x32k,1x4k". Errors: ValueError."""
    found = []
    for part in text.split(","):
        pair = part.split("x")
        if len(pair) != 2:
            raise ValueError(f"--cases: expected batch x tokens, such as 16x32k, with commas between; got {text!r}")
        found.append((options.numbers(pair[0], "--cases")[0], options.numbers(pair[1], "--cases")[0]))
    return found


def attention(geometries: str, cases: str, device: Any, repeats: int, json_: str | None) -> None:
    from kv4.bench import cuda as measurement

    known = list(measurement.GEOMETRIES)
    chosen = options.names(GEOMETRIES if geometries == "all" else geometries, "--geometries", known)
    wanted = cases_of(cases)
    rows = []
    with progress("", len(chosen) * len(wanted)) as advance:
        for geometry in chosen:
            for batch, tokens in wanted:
                advance(0, f"{geometry}, {batch} x {tokens:,}")
                rows += measurement.measure(geometry, batch, tokens, device, repeats=repeats)
                advance(1)
    title = options.device_title(device)
    out.print(f"decode attention on {title}; medians of device time, L2 overwritten before every call")
    for geometry in chosen:
        show([row for row in rows if row.geometry == geometry])
    if json_:
        write_json({"device": title, "rows": [row.to_dict() for row in rows]}, json_)


def show(rows: list) -> None:
    from kv4.bench.cuda import quotients

    first = rows[0]
    shown = table(
        f"{first.geometry}: {first.q_heads} query heads, {first.kv_heads} KV heads, d = {first.head_dim}",
        "batch x tokens", "candidate", "us", "to queue, us", "GB/s", "of copy", "time / int4", left=("candidate",),
    )  # fmt: skip
    for batch, tokens in dict.fromkeys((row.batch, row.tokens) for row in rows):
        here = [row for row in rows if (row.batch, row.tokens) == (batch, tokens)]
        times = quotients(here)
        for row in here:
            shown.add_row(
                f"{batch} x {tokens:,}" if row is here[0] else "",
                row.candidate,
                f"{1e6 * row.seconds:.1f}",
                f"{1e6 * row.host_seconds:.1f}",
                f"{row.gb_per_s:.0f}",
                f"{100 * row.of_copy:.0f} %",
                f"{times[row.candidate]:.2f}x",
                end_section=row is here[-1],
            )
        copied = 1e-9 * here[0].copy_bandwidth
    shown.add_row("", "copy, read and written", "", "", f"{copied:.0f}", "", "")
    out.print(shown)
