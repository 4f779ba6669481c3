"""The `kv4` command. One file per group of commands; torch is imported where a command needs it."""

import os
import sys
from typing import Any

from kv4.cli import openmp
from kv4.extras import require

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'kv4.cli' has no attribute {name!r}")
    from kv4.cli.commands import app

    globals()[name] = app
    return app


def main() -> None:
    """The console script."""
    openmp.bound_spin(os.environ)
    try:
        require("kv4", "tools", "typer", "rich")
    except ImportError as missing:
        sys.exit(str(missing))
    from kv4.cli.commands import app

    app()
