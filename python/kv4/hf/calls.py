"""Creates the caches of an attached model's calls: those of generate(), of the model and of its decoder."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import warnings
import weakref
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kv4.recipe import Recipe

from .cache import CACHE_ARGUMENT, KV4Cache
from .layer import KV4Layer

_SETTINGS = "_kv4_settings"
_CACHE_NAMES = (CACHE_ARGUMENT, "past_key_values")  # transformers accepts the old name as a keyword


@dataclasses.dataclass
class Settings:
    """The arguments of attach(model, ...), kept on the model and on the modules between it and its decoder.

    before: (config, its attention) of the model and its submodels. cache_implementation: of the model's own generation
    config, which stands for what generate() does where its caller asks for no cache in particular.
    """

    recipe: Recipe
    calibration: dict[str, Any]
    before: list[tuple[Any, Any]]
    cache_implementation: str | None


def settings_of(model: Any) -> Settings | None:
    return getattr(model, _SETTINGS, None)


def new_cache(model: PreTrainedModel, recipe: Recipe | None = None) -> KV4Cache:
    """An empty KV4Cache for `model`: with `recipe`, or else the one given to attach(model, ...), or else Recipe()."""
    settings = settings_of(model)
    if settings is None:
        return KV4Cache(model.config, recipe)
    return KV4Cache(model.config, settings.recipe if recipe is None else recipe, **settings.calibration)


def take_over(model: PreTrainedModel, settings: Settings) -> None:
    """Lets `model` and its decoder make KV4Caches from here on. All that is set on them is data and functions of this
    module: it goes with copies, pickles and other processes."""
    let_go(model)
    for module in _way_to_decoder(model):
        object.__setattr__(module, _SETTINGS, settings)
        for name, method in _METHODS.items():
            if hasattr(type(module), name):
                # Not a bound method: pickle would look that up on a model which is not whole yet.
                object.__setattr__(module, name, functools.partial(method, module))
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        if CACHE_ARGUMENT in parameters:
            module.register_forward_pre_hook(MakesCache(parameters), with_kwargs=True)


def let_go(model: PreTrainedModel) -> Settings | None:
    """Undoes take_over; returns what it was given."""
    settings = model.__dict__.get(_SETTINGS)
    for module in model.modules():
        for name in (_SETTINGS, *_METHODS):
            module.__dict__.pop(name, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, MakesCache):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return settings


def _way_to_decoder(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, its decoder, and the models that lie between: whichever of them is called first without a cache makes
    one for all."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(decoder, PreTrainedModel):  # some call their output layer so
        decoder = model.base_model
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in models if module is model or any(part is decoder for part in module.modules())]


class MakesCache:
    """A forward pre-hook: a call that would make a dynamic cache of its own gets a KV4Cache. Calls in training keep
    their own, since no gradient passes through a KV4Cache.

    parameters: names of the forward's parameters, in order.
    """

    def __init__(self, parameters: list[str]) -> None:
        self.positions = {name: parameters.index(name) for name in (CACHE_ARGUMENT, "use_cache") if name in parameters}

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = self._given(args, kwargs)
        if given is None:
            if torch.compiler.is_exporting() or not self._makes_cache(module, args, kwargs):
                return None
            cache = _made_in_call(module)
        elif type(given) is DynamicCache:
            cache = _in_place_of(given, module)
            if cache is None:
                return None
        else:
            return None
        at = self.positions[CACHE_ARGUMENT]
        if len(args) > at:
            return (*args[:at], cache, *args[at + 1 :]), kwargs
        others = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
        return args, {**others, CACHE_ARGUMENT: cache}

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The caller's cache, under either name; None where there is none."""
        given = [self._argument(name, args, kwargs) for name in _CACHE_NAMES]
        return next((cache for cache in given if cache is not None), None)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = self.positions.get(name)
        return args[at] if at is not None and len(args) > at else kwargs.get(name)

    def _makes_cache(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if module.training and torch.is_grad_enabled() or kwargs.get("encoder_hidden_states") is not None:
            return False
        wanted = self._argument("use_cache", args, kwargs)
        if wanted is None:
            wanted = getattr(module.config, "use_cache", None)
        if wanted is None:
            wanted = getattr(module.config.get_text_config(decoder=True), "use_cache", None)
        return bool(wanted)


@torch.compiler.disable
def _made_in_call(module: PreTrainedModel) -> KV4Cache:
    return new_cache(module)


# The cache that the newest generate() of a model made on this thread.
_of_generate = threading.local()


@torch.compiler.disable
def _in_place_of(given: DynamicCache, module: PreTrainedModel) -> KV4Cache | None:
    """The cache that generate() made for this call, where a wrapper (prefix tuning) has put one of its own in its
    place: with that one's tokens. None for a cache that the caller chose."""
    reference = getattr(_of_generate, "caches", {}).get(module)
    cache = reference() if reference is not None else None
    if cache is None or cache.get_seq_length() or not isinstance(given, DynamicCache):
        return None
    filled = [(layer, index) for index, layer in enumerate(given.layers) if getattr(layer, "keys", None) is not None]
    whole = all(layer.get_seq_length() == layer.keys.shape[-2] for layer, _ in filled)
    if not whole or not all(isinstance(cache.layers[index], KV4Layer) for _, index in filled):
        warnings.warn(
            "kv4: a wrapper's own cache cannot be taken over: this generate() runs on it, uncompressed", UserWarning
        )
        return None
    for layer, index in filled:
        if layer.keys.numel():
            cache.update(layer.keys, layer.values, index)
    return cache


def _prepare_cache_for_generation(
    self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """generate()'s own step, with a KV4Cache where it would make a cache that its caller did not ask for."""
    unasked = (None, "dynamic", settings_of(self).cache_implementation)
    wanted = getattr(generation_config, "cache_implementation", None) in unasked
    caches = _of_generate.__dict__.setdefault("caches", weakref.WeakKeyDictionary())
    caches.pop(self, None)
    if wanted and generation_config.use_cache is not False and model_kwargs.get(CACHE_ARGUMENT) is None:
        cache = new_cache(self)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = cache
        caches[self] = weakref.ref(cache)
        return None
    return type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)


def _get_candidate_generator(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """generate()'s own step. A prompt and its first drafts in one call would let the drafts see the whole prompt
    exactly, which one-by-one decoding does not: the first drafts are dropped, so that both give one text."""
    generator = type(self)._get_candidate_generator(self, *args, **kwargs)
    cache = (kwargs.get("model_kwargs") or {}).get(CACHE_ARGUMENT)
    if isinstance(cache, KV4Cache) and cache.recipe.seal == "page" and not generator.requires_model_outputs:
        drafts = generator.get_candidates

        def dropped_at_first(input_ids: Any) -> tuple[Any, None]:
            generator.get_candidates = drafts
            drafts(input_ids)  # for what the generator keeps from call to call
            return input_ids, None

        generator.get_candidates = dropped_at_first
    return generator


# Set on an attached model, over its class's own.
_METHODS = {
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_get_candidate_generator": _get_candidate_generator,
}
