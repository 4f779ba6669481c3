"""The command tree."""

from __future__ import annotations

from typing import Annotated

import typer

from kv4.cli import ablate, bench, demo, evaluate, generate, info, models
from kv4.cli.usage import OneLine

app = typer.Typer(
    name="kv4",
    cls=OneLine,
    help="A 4-bit key/value cache for transformer inference.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from kv4 import __version__

        typer.echo(f"kv4 {__version__}")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.add_typer(evaluate.app, name="eval")
app.command("calibrate")(ablate.calibrate)
app.command("ablate")(ablate.ablate)
app.add_typer(bench.app, name="bench")
app.command("models")(models.models)
app.command("pull")(models.pull)
app.command("info")(info.info)
