"""Switching a model of mlx-lm over to kv4.

mlx-lm's model files bind `scaled_dot_product_attention` by name at import, so the name is replaced where it is
looked up: in the modules that hold the classes of the attached model, and there alone. The function put in its place
passes every call on that does not carry a kv4 handle, so other models of the same file notice nothing.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from mlx_lm.models import cache as stock

from kv4.messages import mismatch
from kv4.per_layer import per_layer
from kv4.recipe import Recipe

from . import core, speculation
from .attention import dense_attention, scaled_dot_product_attention
from .cache import KV4Cache

_NAME = "scaled_dot_product_attention"
_ATTACHED = "_kv4_attached"


def attach(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    record_past: bool = False,
    lambda_k: Any = None,
    lambda_v: Any = None,
    matrix_k: Any = None,
    matrix_v: Any = None,
) -> nn.Module:
    """Lets whatever asks mlx-lm for a new cache of `model` (generate, batch_generate, the server, speculative
    decoding) get kv4's. A cache passed as prompt_cache still counts. Returns the model; attaching again replaces the
    recipe, detach(model) undoes it. The arguments are make_prompt_cache's.

    Errors: ValueError naming the argument, with the reason why the model or recipe cannot be served.
    """
    given = {"lambda_k": lambda_k, "lambda_v": lambda_v, "matrix_k": matrix_k, "matrix_v": matrix_v}
    make_cache = functools.partial(make_prompt_cache, model, recipe, record_past=record_past, **given)
    make_cache()  # raises if the model is unsupported
    object.__setattr__(make_cache, _ATTACHED, True)
    object.__setattr__(model, "make_cache", make_cache)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Restores an attached model's own caches; returns the model."""
    if _attached(model):
        object.__delattr__(model, "make_cache")
    return model


def make_prompt_cache(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    record_past: bool = False,
    lambda_k: Any = None,
    lambda_v: Any = None,
    matrix_k: Any = None,
    matrix_v: Any = None,
) -> list[Any]:
    """A new cache for `model`, as mlx-lm's own make_prompt_cache gives one, with a KV4Cache for each KVCache and
    RotatingKVCache; layers of another kind (recurrent, chunked, lists of caches) keep mlx-lm's.

    Args:
        recipe: a kv4.Recipe; None means Recipe().
        record_past: sliding windows evict nothing, so that a prompt cache may be trimmed at any length. Speculative
            decoding needs it for drafts of more than 64 tokens alone.
        lambda_k, lambda_v: where the recipe's lambda is "given": positive [kv_heads, head_dim], one array for all
            layers, or a sequence or a mapping from layer index with one per layer.
        matrix_k, matrix_v: where the recipe's rotation is "dense": [head_dim, head_dim], in the same forms.

    A layer whose attention bypasses mlx-lm's scaled_dot_product_attention gets dequantised arrays: right, but dense.
    Errors: ValueError naming the argument, with the reason why the model or recipe cannot be served.
    """
    if recipe is None:
        recipe = Recipe()
    own = _own_caches(model)
    reason = _why_not(model, own, recipe)
    if reason is not None:
        raise ValueError(reason)
    given = {"lambda_k": lambda_k, "lambda_v": lambda_v, "matrix_k": matrix_k, "matrix_v": matrix_v}
    constants = per_layer(given, len(own), _matrix)
    speculation.hook()
    layers = list(getattr(model, "layers", []))
    matched = len(layers) == len(own)
    caches = []
    for index, cache in enumerate(own):
        if not _replaceable(cache):
            caches.append(cache)
            continue
        window = cache.max_size if type(cache) is stock.RotatingKVCache else 0
        packed = _hook(layers[index] if matched else model)
        caches.append(
            KV4Cache(recipe, window=window, packed=packed, record_past=record_past, constants=constants[index])
        )
    return caches


def why_not(model: nn.Module, recipe: Recipe | None = None) -> str | None:
    """None where attach(model, recipe) would succeed, else the message of its error."""
    if not isinstance(model, nn.Module):
        return mismatch("model", "a model of mlx-lm", type(model).__name__)
    return _why_not(model, _own_caches(model), recipe if recipe is not None else Recipe())


def _why_not(model: nn.Module, own: list[Any], recipe: Recipe) -> str | None:
    if not isinstance(recipe, Recipe):
        return mismatch("recipe", "a kv4.Recipe or None", type(recipe).__name__)
    if not any(_replaceable(cache) for cache in own):
        kinds = ", ".join(sorted({type(cache).__name__ for cache in own})) or "no layers"
        return mismatch("model", "at least one layer with a KVCache, or a RotatingKVCache with keep=0", kinds)
    for module in model.modules():
        dim = getattr(module, "head_dim", None)
        if isinstance(dim, int) and _calls_attention(module):
            reason = core.why_not(recipe, dim)
            if reason is not None:
                return reason
    return None


def _own_caches(model: nn.Module) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise ValueError(mismatch("model", "a model of mlx-lm", type(model).__name__))
    if _attached(model):
        factory = getattr(type(model), "make_cache", None)
        return factory(model) if factory is not None else [stock.KVCache() for _ in model.layers]
    return stock.make_prompt_cache(model)


def _attached(model: nn.Module) -> bool:
    return hasattr(vars(model).get("make_cache"), _ATTACHED)


def _replaceable(cache: Any) -> bool:
    return type(cache) is stock.KVCache or (type(cache) is stock.RotatingKVCache and not cache.keep)


def _calls_attention(module: nn.Module) -> bool:
    """True for a module whose file calls mlx-lm's attention function and which hands it plain keys and values."""
    found = getattr(sys.modules.get(type(module).__module__), _NAME, None)
    return found in (dense_attention, scaled_dot_product_attention)


def _hook(layer: nn.Module) -> bool:
    """Patches kv4's attention function into the modules that define `layer`'s classes. False where its
    attention does not call mlx-lm's function, or caches latent vectors."""
    attending = [module for module in layer.modules() if _calls_attention(module)]
    if not attending or any(hasattr(module, "kv_lora_rank") for module in layer.modules()):
        return False
    for module in attending:
        home = sys.modules[type(module).__module__]
        if home is not base:
            setattr(home, _NAME, scaled_dot_product_attention)
    return True


def _matrix(given: Any) -> np.ndarray:
    """A matrix for the core: float32, row-major."""
    return np.ascontiguousarray(np.array(given), dtype=np.float32)
