"""The one form of every error message."""

from __future__ import annotations

import operator
from typing import Any


def mismatch(argument: str, expected: object, got: object) -> str:
    """got: what came; an array or a tensor with axes is shown by its shape."""
    shape = getattr(got, "shape", None)
    return f"{argument}: expected {expected}; got {list(shape) if shape else got}"


def whole_number(argument: str, value: Any) -> int:
    """`value` as an int; a tensor of one integer is one too. Errors: ValueError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(mismatch(argument, "a whole number", repr(value))) from None
