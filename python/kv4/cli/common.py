"""What `kv4 eval`, `kv4 ablate` and `kv4 calibrate` share: texts, lengths, recipes, stored results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kv4.cli import options
from kv4.cli.output import err
from kv4.cli.usage import new_file
from kv4.messages import mismatch

Text = Annotated[Path | None, typer.Option(help="A UTF-8 text; Python's language reference if not given.")]
Length = Annotated[str, typer.Option(help="Tokens in a window, 8k for 8,192; its second half is scored.")]
Model = Annotated[str, typer.Argument(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")]
StateFile = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="FILE",
        callback=new_file,
        help="File for results that later runs reuse; in kv4's cache folder if not given.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Neither read nor store results.")]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", callback=new_file, help="The table in Markdown.")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", callback=new_file, help="A picture.")]

PACKED = ("kv4", "trellis", "paper", "exact")
SIMULATED = ("q8_0", "q4_0", "int4-token")


@dataclass
class Bench:
    """A loaded model and what a command needs with it."""

    name: str
    model: Any
    tokenizer: Any
    folder: Path
    identity: dict[str, Any]
    state: Any
    scratch: Path | None


def read_text(path: Path | None) -> tuple[str, str]:
    """(text, its name in output)."""
    from kv4.bench.text import python_reference

    if path is None:
        return python_reference(), "Python's language reference"
    return options.read_utf8("--text", path), path.name


def whole(text: str, option: str, least: int = 1) -> int:
    """A whole number of at least `least`; 1k means 1024. Errors: ValueError."""
    digits, unit = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    if not digits.isdecimal() or int(digits) * unit < least:
        raise ValueError(f"{option}: expected a number of at least {least}, 2k for 2048; got {text!r}")
    return int(digits) * unit


def budgets(text: str, option: str = "--bits") -> tuple[float, ...]:
    """Comma-separated bits per value. Errors: ValueError."""
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 1 <= value <= 9:
            raise ValueError(f"{option}: expected numbers from 1 to 9 with commas between; got {text!r}")
        found.append(value)
    return tuple(found)


def recipe(name: str, simulate: bool = False, known: tuple[str, ...] = (*PACKED, *SIMULATED)) -> Any:
    """A kv4.Recipe by one of the `known` names or from a file or, for simulated formats and where `simulate` is set, a
    Variant. Errors: OSError or ValueError naming --recipe."""
    from kv4.evaluate import variant

    if name not in known and not Path(name).is_file():
        raise FileNotFoundError(mismatch("--recipe", f"one of {', '.join(known)}, or a recipe file", name or "''"))
    if name in SIMULATED:
        return {"q8_0": variant.q8_0, "q4_0": variant.q4_0, "int4-token": variant.int4_token}[name]()
    used = options.load_recipe(name if name in PACKED else "kv4", None if name in PACKED else Path(name))
    return variant.from_recipe(used) if simulate else used


def refined(keys: int, simulate: bool = False) -> Any:
    """kv4's own recipe with `keys` of a page refined, as `recipe` has it."""
    from kv4 import Recipe
    from kv4.evaluate import variant

    used = Recipe(refined=keys)
    return variant.from_recipe(used) if simulate else used


def store(state: Path | None, fresh: bool) -> tuple[Any, Path | None]:
    """(a State, the folder for data that is reused between runs)."""
    from kv4.evaluate.state import State
    from kv4.models.store import cache_dir

    if fresh:
        return State(None), None
    folder = cache_dir() / "evaluations"
    return State(state or folder / "results.jsonl"), folder / "exact"


def bench(
    model: str, dtype: options.DType, threads: int | None, state: Path | None, fresh: bool, device: str = "cpu"
) -> Bench:
    from kv4.calibration import identity_of

    options.set_threads(threads)
    where = options.torch_device(device)
    folder = options.model_folder(model)
    loaded, tokenizer = options.load(model, options.torch_dtype(dtype, where), where)
    kept, scratch = store(state, fresh)
    return Bench(model, loaded, tokenizer, folder, identity_of(folder), kept, scratch)


def write_markdown(lines: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    err.print(f"table: {escape(str(path))}", soft_wrap=True)


def say_plot(path: Path) -> None:
    err.print(f"plot: {escape(str(path))}", soft_wrap=True)
