"""`kv4 bench vllm`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from kv4.cli import options
from kv4.cli.bench_cuda import cases_of
from kv4.cli.output import out, progress, table, write_json


@dataclass
class Chosen:
    """What an engine runs and with which caches, as the command's options say it."""

    model: Path | None
    shape: str | None
    kinds: str
    layers: int | None

    def checked(self) -> list[str]:
        """Kinds of caches. Errors: ImportError without vLLM, ValueError for options that do not go together."""
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise ImportError(f"kv4 bench vllm: expected vLLM in this environment; got {error}") from None
        from kv4.bench.vllm import KINDS

        chosen = options.names(self.kinds, "--kinds", list(KINDS))
        if (self.model is None) == (self.shape is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(f"kv4 bench vllm: expected --model or --shape; got {got}")
        if self.layers is not None and self.shape is None:
            raise ValueError(f"--layers: expected --shape beside it, a model has its own; got {self.layers}")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"--model: expected a model's folder, with config.json; got {self.model}")
        return chosen

    @property
    def folder(self) -> str | None:
        return None if self.model is None else str(self.model)

    @property
    def title(self) -> str:
        import vllm

        return f"{self.shape or self.model} in vLLM {vllm.__version__}"


def steps(chosen: Chosen, cases: str, count: int, settings: dict[str, Any], json_: str | None) -> None:
    kinds, wanted = chosen.checked(), cases_of(cases)
    from kv4.bench import vllm as measurement

    with progress("", len(kinds) * len(wanted)) as advance:
        rows = measurement.measure(
            chosen.folder,
            chosen.shape,
            kinds,
            wanted,
            count,
            settings,
            lambda what: advance(1, what),
            chosen.layers,
        )
    show(chosen.title, rows)
    if json_:
        write_json({"title": chosen.title, "rows": [row.to_dict() for row in rows]}, json_)


def served(
    chosen: Chosen, requests: int, rate: float | None, longest: int, settings: dict[str, Any], json_: str | None
) -> None:
    kinds = chosen.checked()
    from kv4.bench import vllm_serve as measurement

    load = measurement.Load(requests, rate, longest)
    with progress("", len(kinds)) as advance:
        rows = measurement.measure(
            chosen.folder, chosen.shape, kinds, load, settings, lambda what: advance(1, what), chosen.layers
        )
    arriving = "at once" if rate is None else f"{rate:g} a second"
    title = f"{chosen.title}, {requests} chats {arriving}"
    shown = table(
        title, "cache", "answered", "requests / s", "tokens / s", "first token, ms", "ms a token", "99 %",
        left=("cache",),
    )  # fmt: skip
    for row in rows:
        if row.refused is None:
            shown.add_row(
                row.kind,
                f"{row.completed} of {row.completed + row.failed}",
                f"{row.requests_a_second:.2f}",
                f"{row.tokens_a_second:.0f}",
                f"{row.first_token_ms:.0f}",
                f"{row.token_ms:.2f}",
                f"{row.slow_token_ms:.1f}",
            )
    out.print(shown)
    refusals(rows)
    if json_:
        write_json({"title": title, "rows": [row.to_dict() for row in rows]}, json_)


def refusals(rows: list) -> None:
    for row in rows:
        if row.refused is not None:
            out.print(f"{row.kind}: {escape(row.refused)}")


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
    refusals(rows)
