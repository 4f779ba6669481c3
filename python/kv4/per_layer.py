"""What a cache is given for its layers: one matrix for all, or one for each; widths of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kv4.messages import mismatch
from kv4.recipe import Recipe


def per_layer(given: Mapping[str, Any], layers: int, convert: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """One dict of core arguments per layer, of the names that have a value there. given: by name, one matrix for every
    layer, or a sequence or a mapping from layer index with one per layer; None is none. convert: what the core is to
    read of one, done once for all layers that are given the same. Errors: ValueError naming what was given."""
    result: list[dict[str, Any]] = [{} for _ in range(layers)]
    # Keyed by object identity; the objects are kept alive until the end.
    converted: dict[int, tuple[Any, Any]] = {}
    for name, value in given.items():
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
        for index, entry in items:
            if entry is None:
                continue
            if id(entry) not in converted:
                try:
                    matrix = convert(entry)
                except (TypeError, ValueError, RuntimeError):
                    raise ValueError(mismatch(f"{name}[{index}]", "a matrix", type(entry).__name__)) from None
                if matrix.ndim != 2:
                    raise ValueError(mismatch(f"{name}[{index}]", "a matrix", matrix))
                converted[id(entry)] = entry, matrix
            result[index][name] = converted[id(entry)][1]
    return result


def recipes_of(recipe: Recipe, bits: Any, layers: int) -> list[Recipe]:
    """The recipe of each layer. bits: None, (bits of keys, bits of values) of every layer in a sequence, or of some in
    a mapping from layer index. Errors: ValueError naming what was given."""
    if bits is None:
        return [recipe] * layers
    if isinstance(bits, Mapping):
        unknown = [key for key in bits if not (isinstance(key, int) and 0 <= key < layers)]
        if unknown:
            raise ValueError(mismatch("bits", f"layer indices 0...{layers - 1}", unknown[0]))
        pairs = [bits.get(index) for index in range(layers)]
    elif isinstance(bits, Sequence) and not isinstance(bits, (str, bytes)):
        if len(bits) != layers:
            raise ValueError(mismatch("bits", f"one entry per layer ({layers})", len(bits)))
        pairs = list(bits)
    else:
        raise ValueError(mismatch("bits", "a pair for each layer", type(bits).__name__))
    found = []
    for index, pair in enumerate(pairs):
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(x) is int for x in pair)
        if pair is not None and not whole:
            raise ValueError(mismatch(f"bits[{index}]", "bits of keys and bits of values", repr(pair)))
        try:
            found.append(recipe if pair is None else recipe.with_bits(*pair))
        except ValueError as error:
            raise ValueError(f"bits[{index}]: {error}") from None
    return found
