"""Settings of a server, from `--additional-config` or the environment: the recipe, or a calibration."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from kv4 import Recipe
from kv4._core import PAGE_TOKENS as PAGE
from kv4.calibration import Calibration, load
from kv4.messages import mismatch

_NAMED = {"kv4": Recipe, "exact": Recipe.exact}
_load = lru_cache(load)


def recipe_of(additional: Any) -> Recipe:
    """The recipe: the calibration's, else that of vLLM's additional config, of the environment, or the default. Raises
    ValueError naming the setting."""
    where, given = _setting(additional, "recipe")
    calibration = calibration_of(additional)
    if calibration is not None:
        if given is not None:
            raise ValueError(mismatch(where, "none beside a calibration, which has its own", given))
        return calibration.recipe
    given = "kv4" if given is None else given
    expected = f"{', '.join(_NAMED)}, or a file that Recipe.to_file wrote"
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


def calibration_of(additional: Any) -> Calibration | None:
    """The calibration of vLLM's additional config, else of KV4_VLLM_CALIBRATION, if any. Raises ValueError naming the
    setting."""
    where, given = _setting(additional, "calibration")
    if given is None:
        return None
    try:
        found = _load(given)
    except (OSError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from None
    checked(found.recipe, where, calibrated=True)
    return found


def _setting(additional: Any, name: str) -> tuple[str, str | None]:
    """Where it was set, and to what."""
    own = additional.get("kv4", {}) if isinstance(additional, dict) else {}
    if not isinstance(own, dict) or not set(own) <= {"recipe", "calibration"}:
        raise ValueError(mismatch("additional_config.kv4", 'an object with "recipe" or "calibration"', own))
    if name not in own:
        where = f"KV4_VLLM_{name.upper()}"
        return where, os.environ.get(where)
    where = f"additional_config.kv4.{name}"
    if not isinstance(own[name], str):
        raise ValueError(mismatch(where, "a name or a file", repr(own[name])))
    return where, own[name]


def checked(recipe: Recipe, where: str, calibrated: bool = False) -> Recipe:
    """The recipe, if a server can implement it: what a token sees depends on its position alone, in pages of 64."""
    if recipe.seal == "arrival":
        raise ValueError(mismatch(f"{where}: seal", "page or never", recipe.seal))
    if recipe.seal == "page" and (recipe.window != PAGE or recipe.sinks > PAGE):
        expected = f"a window of {PAGE} and at most {PAGE} sinks"
        raise ValueError(mismatch(where, expected, f"{recipe.window} and {recipe.sinks}"))
    for name, side in (("key", recipe.key), ("value", recipe.value)):
        given = side.lambda_ == "given" and not (calibrated and name == "key")
        if side.rotation == "dense" or given:
            expected = "lambda of keys alone" if calibrated else "nothing that a calibration has to give"
            raise ValueError(mismatch(f"{where}: {name}", expected, side))
    return recipe
