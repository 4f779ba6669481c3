"""How the slow steps report: a callable that a command may draw as bars."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the step under way and how far it is.

    Steps come in this order, and a step may be called many times with growing ``done``:
    "download" and "verify" (bytes), "read" (passes over the header), "convert" (tensors), "save" (0 then 1, of 1).
    A step that is not needed is left out; nothing is reported where the folder is already there.
    """

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """The default: no report."""
