"""The one form of every error message."""

from __future__ import annotations


def mismatch(argument: str, expected: object, got: object) -> str:
    return f"{argument}: expected {expected}; got {got}"
