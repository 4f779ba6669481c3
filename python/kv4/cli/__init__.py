"""The `kv4` command. One file per group of commands; torch is imported where a command needs it."""

from kv4.cli.app import app

__all__ = ["app"]
