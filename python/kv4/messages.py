"""The one form of every error message."""

from __future__ import annotations


def mismatch(argument: str, expected: object, got: object) -> str:
    """got: what came; an array or a tensor with axes is shown by its shape."""
    shape = getattr(got, "shape", None)
    return f"{argument}: expected {expected}; got {list(shape) if shape else got}"
