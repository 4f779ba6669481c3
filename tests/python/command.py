"""The `kv4` command, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from kv4.cli import app


def kv4(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def succeeded(*arguments: object, stdin: str | None = None) -> Result:
    result = kv4(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result
