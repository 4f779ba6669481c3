"""The command tree."""

from __future__ import annotations

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
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.add_typer(evaluate.app, name="eval")
app.command("calibrate")(ablate.calibrate)
app.command("ablate")(ablate.ablate)
app.add_typer(bench.app, name="bench")
app.command("models")(models.models)
app.command("pull")(models.pull)
app.command("info")(info.info)
