"""What the user of a server sets: the recipe, by `--additional-config` or KV4_VLLM_RECIPE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kv4 import Recipe
from kv4._core import PAGE_TOKENS as PAGE
from kv4.messages import mismatch

_NAMED = {"kv4": Recipe, "exact": Recipe.exact}


def recipe_of(additional: Any) -> Recipe:
    """From vLLM's additional config, else the environment, else kv4's own. Raises ValueError naming the setting."""
    own = additional.get("kv4", {}) if isinstance(additional, dict) else {}
    if not isinstance(own, dict) or not set(own) <= {"recipe"}:
        raise ValueError(mismatch("additional_config.kv4", 'an object with "recipe"', own))
    if "recipe" in own:
        where, given = "additional_config.kv4.recipe", own["recipe"]
    else:
        where, given = "KV4_VLLM_RECIPE", os.environ.get("KV4_VLLM_RECIPE", "kv4")
    expected = f"{', '.join(_NAMED)}, or a file that Recipe.to_file wrote"
    if not isinstance(given, str):
        raise ValueError(mismatch(where, expected, repr(given)))
    if given in _NAMED:
        recipe = _NAMED[given]()
    elif Path(given).is_file():
        try:
            recipe = Recipe.from_file(given)
        except (OSError, ValueError) as e:
            raise ValueError(f"{where}: {e}") from None
    else:
        raise ValueError(mismatch(where, expected, repr(given)))
    return checked(recipe, where)


def checked(recipe: Recipe, where: str) -> Recipe:
    """The recipe if a server can keep to it: what a token sees follows from its position, in pages of 64."""
    if recipe.seal == "arrival":
        raise ValueError(mismatch(f"{where}: seal", "page or never", recipe.seal))
    if recipe.seal == "page" and (recipe.window != PAGE or recipe.sinks > PAGE):
        expected = f"a window of {PAGE} and at most {PAGE} sinks"
        raise ValueError(mismatch(where, expected, f"{recipe.window} and {recipe.sinks}"))
    for name, side in (("key", recipe.key), ("value", recipe.value)):
        if side.rotation == "dense" or side.lambda_ == "given":
            raise ValueError(mismatch(f"{where}: {name}", "nothing that a calibration has to give", side))
    return recipe
