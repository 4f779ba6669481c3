"""`kv4 bench vllm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from kv4.cli import options
from kv4.cli.bench_cuda import cases_of
from kv4.cli.output import out, progress, table, write_json


def steps(
    model: Path | None,
    shape: str | None,
    kinds: str,
    cases: str,
    count: int,
    settings: dict[str, Any],
    json_: str | None,
    layers: int | None = None,
) -> None:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(f"kv4 bench vllm: expected vLLM in this environment; got {error}") from None
    from kv4.bench import vllm as measurement

    chosen = options.names(kinds, "--kinds", list(measurement.KINDS))
    wanted = cases_of(cases)
    if (model is None) == (shape is None):
        raise ValueError("kv4 bench vllm: expected --model or --shape; got " + ("neither" if model is None else "both"))
    if layers is not None and shape is None:
        raise ValueError(f"--layers: expected --shape beside it, a model has its own; got {layers}")
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model: expected a model's folder, with config.json; got {model}")
    with progress("", len(chosen) * len(wanted)) as advance:
        rows = measurement.measure(
            None if model is None else str(model),
            shape,
            chosen,
            wanted,
            count,
            settings,
            lambda what: advance(1, what),
            layers,
        )
    title = f"{shape or model} in vLLM {vllm.__version__}"
    show(title, rows)
    if json_:
        write_json({"title": title, "rows": [row.to_dict() for row in rows]}, json_)


def show(title: str, rows: list) -> None:
    shown = table(
        title, "sequences x tokens", "cache", "ms a step", "kv4 / this", "prefill, s", "tokens that fit",
        left=("cache",),
    )  # fmt: skip
    measured = [row for row in rows if row.refused is None]
    for case in dict.fromkeys((row.batch, row.tokens) for row in measured):
        here = [row for row in measured if (row.batch, row.tokens) == case]
        own = {row.kind: row.step_seconds for row in here}
        for row in here:
            shown.add_row(
                f"{case[0]} x {case[1]:,}" if row is here[0] else "",
                row.kind,
                f"{1e3 * row.step_seconds:.2f}",
                f"{own['kv4'] / row.step_seconds:.2f}" if "kv4" in own else "",
                f"{row.prefill_seconds:.2f}",
                f"{row.tokens_that_fit:,}" if row.tokens_that_fit else "",
                end_section=row is here[-1],
            )
    out.print(shown)
    for row in rows:
        if row.refused is not None:
            out.print(f"{row.kind}: {escape(row.refused)}")
