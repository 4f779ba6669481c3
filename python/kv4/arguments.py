"""Calls of the compiled module with arguments that it does not take."""

from __future__ import annotations

import re

from kv4.messages import mismatch

_PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "object": "a value",
    "collections.abc.Callable": "a function",
}
_NUMBERS = {"bool": 0, "int": 1, "float": 2}  # each is one of those after it, too
_DATA = {*_NUMBERS, "str", "bytes", "list", "tuple", "dict", "set", "NoneType"}


def wrong_arguments(text: str) -> str:
    """In one line, what nanobind says in several of a call of `kv4._core` with arguments that the function does not
    take: its signature, and the types that came. Called by python/bindings/errors.cpp."""
    found = re.search(r"^    1\. (\w+)\((.*)\)(?: -> .*)?\n\nInvoked with types: (.*)", text, re.DOTALL | re.MULTILINE)
    if found is None or "\n" in found[2] + found[3]:
        return " ".join(text.split())
    function, signature, came = found.groups()
    parameters = {x.split(":")[0].split(" = ")[0]: x for x in _split(signature)}
    given, _, named = came.partition("kwargs = { ")
    by_place = _split(given)
    call = f"{by_place[0].rpartition('.')[2] if function == '__init__' else function}()"
    by_name = [(x.partition(": ")[0], x.partition(": ")[2]) for x in _split(named.removesuffix(" }"))]
    return _of_names(call, parameters, by_place, by_name) or _of_a_value(
        call,
        parameters,
        {**dict(zip((name for name in parameters if name != "*"), by_place, strict=False)), **dict(by_name)},
    )


def _of_names(call: str, parameters: dict[str, str], by_place: list[str], by_name: list[tuple[str, str]]) -> str:
    """Of arguments more than there are, unknown or given twice; empty where there are none."""
    names = [name for name in parameters if name != "*"]
    placed = names[: list(parameters).index("*")] if "*" in parameters else names
    own = "self" in parameters
    if len(by_place) > len(placed):
        most = f"at most {len(placed) - own}{' by position' if '*' in parameters else ''}"
        return mismatch(f"arguments of {call}", most, len(by_place) - own)
    for name, _ in by_name:
        if name not in names:
            known = ", ".join(names[own:]) or "none"
            return mismatch(name, f"an argument of {call}, one of {known}", "an unknown one")
        if name in placed[: len(by_place)]:
            return mismatch(name, "a value", "two of them")
    return ""


def _of_a_value(call: str, parameters: dict[str, str], types: dict[str, str]) -> str:
    """Which parameter of `call` has no value, or one of a type that is none of its own."""
    expected = {name: text.partition(": ")[2].partition(" = ")[0] for name, text in parameters.items() if ": " in text}
    for name in expected:
        if name not in types and " = " not in parameters[name]:
            return mismatch(name, _plain(expected[name]), "none")
    fits = {name: _fits(expected[name], types[name]) for name in expected if name in types}
    for wanted in (False, None):
        for name, fit in fits.items():
            if fit is wanted:
                return mismatch(
                    name, _plain(expected[name]), types[name].rpartition(".")[2].replace("NoneType", "None")
                )
    if integers := ", ".join(name for name in fits if "int" in expected[name]):
        return mismatch(integers, "values in range", "one out of it")
    return mismatch(f"self of {call}", "an object of the class that has it", types.get("self", "none"))


def _plain(annotation: str) -> str:
    parts = [
        _PLAIN.get(part, part) for part in annotation.split(" | ") if annotation != "object | None" or part != "None"
    ]
    return re.sub(r"\b(collections\.abc|kv4\._core)\.", "", " or ".join(parts))


def _fits(annotation: str, kind: str) -> bool | None:
    """None: what is inside decides, or a conversion."""
    for part in annotation.split(" | "):
        if part == kind or (part == "None" and kind == "NoneType") or (part == "object" and kind != "NoneType"):
            return True
        if part in _NUMBERS and _NUMBERS.get(kind, 3) <= _NUMBERS[part] and part != "bool":
            return True
    simple = all(part in (*_DATA, "None", "object") or part.startswith("kv4.") for part in annotation.split(" | "))
    if kind in _DATA - {"list", "tuple"} or kind.startswith("kv4.") or simple:
        return False
    return None


def _split(text: str) -> list[str]:
    """At commas that are in no brackets and no string."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += (sign in "([{") - (sign in ")]}") if not quote else 0
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]
