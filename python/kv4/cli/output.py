"""Output of every command: tables, progress bars, JSON and one-line errors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kv4.messages import mismatch

P = ParamSpec("P")
R = TypeVar("R")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

BAD_INPUT = 2
TRACEBACK_VARIABLE = "KV4_TRACEBACK"

# Raised by the library, transformers and the file system for invalid input.
INPUT_ERRORS = (ValueError, OSError, LookupError, NotImplementedError, MemoryError, RuntimeError, ImportError)


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(mismatch(variable, "1, 0 or nothing", value))
    return value == "1"


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turns an exception into one red line and exit status 2; KV4_TRACEBACK=1 lets it through."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        let_through = False
        try:
            let_through = _switch(TRACEBACK_VARIABLE)
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):  # RuntimeErrors themselves
            raise
        except INPUT_ERRORS as error:
            if let_through:
                raise
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            line = " ".join(text.split()) or type(error).__name__  # some messages have several lines
            err.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
            raise typer.Exit(BAD_INPUT) from None

    return wrapped


def table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    """A table with right-aligned columns; `left` names those that are left-aligned."""
    made = Table(
        title=title,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right")
    return made


def mebibytes(count: float) -> str:
    return f"{count / (1 << 20):.2f} MiB"


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, gone when done. Yields advance(count, description=None)."""
    if not err.is_terminal:  # rich before 14.2 ends even a disabled bar with an empty line
        yield lambda count=1, description=None: None
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: float = 1, description: str | None = None) -> None:
            bar.update(task, advance=count, description=description)

        yield advance


@contextmanager
def model_steps() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each step of fetching and converting a model (kv4.models.Progress)."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    if not err.is_terminal:
        yield lambda step, done, total: None
        return
    bar = Progress(*columns, console=err)
    tasks: dict[str, TaskID] = {}

    def report(step: str, done: int, total: int) -> None:
        bar.start()  # only once there is something to show
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=total)
        bar.update(tasks[step], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bar.stop()


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """A spinner on stderr for work of unknown length."""
    if not err.is_terminal:
        yield
        return
    with err.status(description):
        yield


def write_json(data: Any, path: str | Path) -> None:
    """JSON to a file, or to stdout for "-". Values that JSON has no number for become null."""
    text = json.dumps(_finite(data), indent=2)
    if str(path) == "-":
        typer.echo(text)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n", encoding="utf-8")
    err.print(f"data: {escape(str(target))}", soft_wrap=True)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
