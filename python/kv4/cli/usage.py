"""Usage errors of the command line, on one line and in the same form as all errors."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from kv4.cli.output import BAD_INPUT, err
from kv4.messages import mismatch

# typer bundles click or depends on it, by version; in both cases this is the base class of its errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_BOUNDS = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}
# What typer says where it leaves parsing to click.
_NOT_A_NUMBER = re.compile(r"'(.*)' is not a valid (integer|float)(?: range)?\.?")
_OUT_OF_RANGE = re.compile(r"(\S+) is not in the range (?:(\S+)<=)?x(?:>=(\S+?)|<=(\S+?))?\.?")
_KINDS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}


class OneLine(TyperGroup):
    """A command tree that answers a usage error with `error: NAME: expected ...; got ...` and exit status 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.ctx.get_help(), err=True)  # type: ignore[attr-defined]
            else:
                err.print(f"[bold red]error:[/] {escape(in_a_line(error))}", soft_wrap=True)
            sys.exit(BAD_INPUT)
        except typer.Abort:
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def in_a_line(error: Any) -> str:
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "kv4"
    message = " ".join(str(error.message or "").split())
    option = getattr(error, "option_name", None)
    if option is not None:
        if type(error).__name__ == "NoSuchOption":
            return mismatch(option, f"an option of {command}", "an unknown one")
        return mismatch(option, "a value", "none") if "requires" in message else f"{command}: {message}"
    param = getattr(error, "param", None)
    if param is None:
        return _of_the_command(error, command, message)
    name = max(param.opts, key=len) if param.opts else str(param.name)
    if type(error).__name__ == "MissingParameter":
        return mismatch(name, "a value", "none")
    if message.startswith("expected "):
        return f"{name}: {message}"
    return mismatch(name, *_expected_and_got(error, message))


def _of_the_command(error: Any, command: str, message: str) -> str:
    unknown = re.fullmatch(r"No such command '(.*)'\.", message)
    commands = getattr(getattr(error.ctx, "command", None), "commands", {})
    if unknown is not None and commands:
        return mismatch(command, f"a command, one of {', '.join(commands)}", repr(unknown.group(1)))
    extra = re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message)
    if extra is not None:
        return mismatch(command, "no further arguments", extra.group(1))
    return f"{command}: {message}"


def _expected_and_got(error: Any, message: str) -> tuple[str, str]:
    choice = re.fullmatch(r"(?:Value error, )?(.+) is not one of (.+?)\.?", message)
    if choice is not None:
        return f"one of {choice.group(2)}", choice.group(1)
    if (number := _NOT_A_NUMBER.fullmatch(message)) is not None:
        return _KINDS["int_parsing" if number.group(2) == "integer" else "float_parsing"], repr(number.group(1))
    if (out := _OUT_OF_RANGE.fullmatch(message)) is not None:
        got, low, most = out.group(1), out.group(2) or out.group(3), out.group(4)
        below = low is not None and float(got) < float(low)
        return f"a number, at least {low}" if below else f"a number, at most {most}", repr(got)
    reasons = getattr(error.__cause__, "errors", list)()
    if not reasons:
        return "another value", message
    first = reasons[0]
    got = repr(first.get("input"))
    if first["type"] in _BOUNDS:
        key, words = _BOUNDS[first["type"]]
        return f"a number, {words} {first['ctx'][key]}", got
    return _KINDS.get(first["type"], message), got


def new_file(value: Any) -> Any:
    """A callback of options that name an output file: one that cannot be written is an error before the work."""
    return _writable(value, "a file", Path.is_dir, "a folder")


def new_folder(value: Any) -> Any:
    """The same for an output folder."""
    return _writable(value, "a folder", Path.is_file, "a file")


def _writable(value: Any, what: str, other: Callable[[Path], bool], name: str) -> Any:
    if value is None or str(value) == "-":
        return value
    path = Path(value)
    if str(value) in ("", "."):
        if what == "a folder":
            return value
        raise typer.BadParameter(f"expected {what} that can be written; got an empty name")
    if other(path):
        raise typer.BadParameter(f"expected {what} that can be written; got {value}, {name}")
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if (place != path and not place.is_dir()) or not os.access(place, os.W_OK):
        raise typer.BadParameter(f"expected {what} that can be written; got {value}: {place} cannot be written to")
    return value
