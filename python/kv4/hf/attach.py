"""Switching a loaded model over to kv4."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from kv4.messages import mismatch
from kv4.recipe import Recipe

from .cache import KV4Cache
from .calls import Settings, let_go, settings_of, take_over
from .device import DTYPES, new_core, usable_devices, why_no_device
from .kinds import PACKED_LAYER_TYPES, layer_kinds
from .layer import KV4Layer


def attach(
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    lambda_k: Any = None,
    lambda_v: Any = None,
    matrix_k: Any = None,
    matrix_v: Any = None,
    bits: Any = None,
) -> PreTrainedModel:
    """Switches `model` to the kv4 attention and lets it use a new KV4Cache wherever generate(), or a call of the model
    or of its decoder, would have made a dynamic cache of its own; a cache passed by the caller, `cache_implementation`
    and use_cache=False still count. Calls in training, with gradients, keep the model's own cache. Copies and pickles
    of an attached model are attached. Returns the model. Attaching again replaces the recipe; detach(model) undoes it.

    The arguments after `model` are those of KV4Cache.

    Errors: ValueError naming the argument, with the reason why this model or recipe cannot be served; the model is
    then as it was.
    """
    calibration = {"lambda_k": lambda_k, "lambda_v": lambda_v, "matrix_k": matrix_k, "matrix_v": matrix_v}
    calibration["bits"] = bits
    reason = why_not(model, recipe, **calibration)
    if reason is not None:
        raise ValueError(reason)
    previous = settings_of(model)
    before = previous.before if previous else _implementations(model)
    own = previous.cache_implementation if previous else _cache_implementation(model)
    try:
        model.set_attn_implementation("kv4")
        got = model.config.get_text_config(decoder=True)._attn_implementation
        if got != "kv4":
            raise ValueError(
                mismatch("model", 'one that takes attn_implementation="kv4"', f"{_name(model)} with {got}")
            )
    except Exception:
        _restore(before)
        raise
    take_over(model, Settings(recipe if recipe is not None else Recipe(), calibration, before, own))
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Gives an attached model its former attention and cache back; returns the model."""
    settings = let_go(model)
    if settings is not None:
        _restore(settings.before)
    return model


def why_not(model: PreTrainedModel, recipe: Recipe | None = None, **calibration: Any) -> str | None:
    """None where attach(model, recipe) would succeed, else the message of its error. Takes attach's arguments."""
    if not isinstance(model, PreTrainedModel):
        return mismatch("model", "a transformers PreTrainedModel", _what(model))
    name, config = _name(model), model.config
    if config.is_encoder_decoder:
        still = "an EncoderDecoderCache of two KV4Caches still works with it, dequantising"
        return mismatch("model", "a decoder-only model", f"{name}, an encoder-decoder model ({still})")
    supports = getattr(type(model), "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return mismatch("model", "a model that takes a transformers Cache", f"{name}, which brings its own cache")
    decoder = config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False) and getattr(decoder, "layer_types", None) is None:
        return mismatch("model", "a model whose state a transformers Cache holds", f"{name}, which carries its own")
    types = [kind for kind, _ in layer_kinds(decoder)]
    if not any(layer_type in PACKED_LAYER_TYPES for layer_type in types):
        found = ", ".join(sorted(set(types))) or "no layers"
        return mismatch("model", f"at least one layer of {', '.join(PACKED_LAYER_TYPES)}", f"{name} with {found}")
    if not model._can_set_attn_implementation():
        return mismatch(
            "model",
            "a model built on transformers' attention interface",
            f"{name}, whose attention cannot be replaced (a KV4Cache still works with it, dequantising)",
        )
    for module in _decoder(model).modules():
        if (reason := _reads_otherwise(module)) is not None:
            got = f"{name}, {reason} (a KV4Cache still works with it, dequantising)"
            return mismatch("model", "a model built on transformers' attention interface", got)
    for parameter in model.parameters():
        reason = why_no_device(parameter.device)
        if reason is not None:
            got = f"{name} with parameters on {parameter.device}{reason}"
            return mismatch("model", f"a model on {usable_devices()}", got)
    if model.dtype not in DTYPES:
        return mismatch("model", "float32, float16 or bfloat16 activations", f"{name} in {model.dtype}")
    try:
        cache = KV4Cache(config, recipe, **calibration)
    except ValueError as error:
        return str(error)
    if any(hasattr(module, "expand_kv") for module in model.modules()):
        return mismatch(
            "model",
            "attention that reads keys and values from the cache",
            f"{name}, which caches latent vectors (a KV4Cache still works with it, dequantising)",
        )
    return _dims_not_served(model, cache)


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _reads_otherwise(module: torch.nn.Module) -> str | None:
    """Why the kv4 attention cannot stand in for an attention module of a model that takes another attention, whether or
    not this module does; None where it can. Read from the source: transformers' own flag is for a whole model."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return None
    if ".update(" not in source:
        return None
    if "attention_interface" not in source:
        return f"whose {_name(module)} computes its attention itself"
    if "sinks=" in source:
        return f"whose {_name(module)} hands over sinks of every query"
    return None


def _dims_not_served(model: PreTrainedModel, cache: KV4Cache) -> str | None:
    """The message for the first head dims that the recipe does not serve. Attention modules that do not say their
    head dims are checked by the cache's first update."""
    tried = set()
    for module in _decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(cache.layers):
            continue
        layer = cache.layers[index]
        dim_k = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        dim_v = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
        if not (isinstance(layer, KV4Layer) and isinstance(dim_k, int) and isinstance(dim_v, int)):
            continue
        constants = layer.constants
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        rank = layer.rank if layer.recipe.bits is not None else None
        case = (dim_k, dim_v, device, layer.recipe, rank, index if constants else None)
        if case in tried:
            continue
        tried.add(case)
        heads = next((len(values) for key, values in constants.items() if key.startswith("lambda")), 1)
        try:
            new_core(
                device,
                layer.recipe.at(dim_k, dim_v, *layer.rank),
                dtype=DTYPES[model.dtype],
                kv_heads=heads,
                head_dim_k=dim_k,
                head_dim_v=dim_v,
                **constants,
            )
        except (ValueError, NotImplementedError, RuntimeError) as error:
            expected = f"one that serves {_name(model)} (head dims {dim_k} and {dim_v}, layer {index})"
            return mismatch("recipe", expected, error)
    return None


def _implementations(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """(config, its attention) of the model and its submodels, outermost first."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [(config, config._attn_implementation) for config in {id(c): c for c in configs}.values()]


def _restore(implementations: list[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation = implementation


def _cache_implementation(model: PreTrainedModel) -> str | None:
    return getattr(getattr(model, "generation_config", None), "cache_implementation", None)


def _what(wrapper: Any) -> str:
    """The type of what is no model and, where one is within its reach, how to say which."""
    name = _name(wrapper)
    if isinstance(wrapper, torch.nn.Module):
        inner = ((path, module) for path, module in wrapper.named_modules() if isinstance(module, PreTrainedModel))
    else:
        inner = ((path, value) for path, value in getattr(wrapper, "__dict__", {}).items())
    path = next((path for path, module in inner if isinstance(module, PreTrainedModel)), None)
    return name if path is None else f"{name} around one: attach(model.{path})"


def _name(model: Any) -> str:
    return type(model).__name__
