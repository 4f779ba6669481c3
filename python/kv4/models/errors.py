"""The one error of this package, worded like the core's: what, what was expected, what came."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be had as asked."""

    def __init__(self, argument: str, expected: str, got: str) -> None:
        super().__init__(f"{argument}: expected {expected}; got {got}")
        self.argument = argument
        self.expected = expected
        self.got = got
