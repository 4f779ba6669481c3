"""The `kv4` command. One file per group of commands; torch is imported where a command needs it."""

import os

from kv4.cli import openmp
from kv4.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    openmp.bound_spin(os.environ)
    app()
