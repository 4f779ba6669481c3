"""What a cache is given for its layers: one thing for all, or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kv4.messages import mismatch


def spread(given: Mapping[str, Any], layers: int) -> Iterator[tuple[str, int, Any]]:
    """(name, layer, value) of all that has a value. given: by name, one value for every layer, or a sequence or a
    mapping from layer index with one per layer; None is no value. Errors: ValueError naming what was given."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            unknown = [key for key in value if not (isinstance(key, int) and 0 <= key < layers)]
            if unknown:
                raise ValueError(mismatch(name, f"layer indices 0...{layers - 1}", unknown[0]))
            items: Iterable[tuple[int, Any]] = value.items()
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            if len(value) != layers:
                raise ValueError(mismatch(name, f"one entry per layer ({layers})", len(value)))
            items = enumerate(value)
        else:
            items = ((i, value) for i in range(layers))
        yield from ((name, index, entry) for index, entry in items if entry is not None)
