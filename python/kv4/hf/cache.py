"""KV4Cache: a transformers cache whose attention layers live in the kv4 core."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin
from transformers.generation import utils as generation

from kv4.messages import mismatch, whole_number
from kv4.per_layer import per_layer, recipes_of
from kv4.recipe import Recipe

from . import files, report, saved
from .kinds import HYBRID_LAYER_TYPES, PACKED_LAYER_TYPES, served_kinds
from .layer import KV4Layer, row_numbers, rows_of_index
from .states import KV4HybridLayer

# The argument of forwards and of generate() that takes a cache; transformers 5.24 renamed it.
CACHE_ARGUMENT = "cache" if "cache" in getattr(generation, "ALL_CACHE_NAMES", ()) else "past_key_values"


class KV4Cache(DynamicCache):
    """A transformers cache that keeps keys and values in 4 bits, for any decoder model on the CPU, a CUDA device or an
    Apple GPU. Each layer lives where its first keys are.

        cache = KV4Cache(model.config)
        model.generate(**inputs, past_key_values=cache)

    Args:
        config: the model's config (its text decoder's part is used).
        recipe: a kv4.Recipe; None means Recipe().
        lambda_k, lambda_v: where the recipe's lambda is "given": positive [kv_heads, head_dim], one tensor for all
            layers, or a sequence or a mapping from layer index with one per layer.
        matrix_k, matrix_v: where the recipe's rotation is "dense": [head_dim, head_dim], in the same forms.
        bits: (bits of keys, bits of values) of each layer in place of the recipe's, a sequence with a pair for every
            layer or a mapping from layer index: 2, 3, 4, 6 or 8, on a CUDA device 2 to 4. Of a budget for the model,
            Recipe(bits=...) makes them.
        cross_attention: for the second part of an EncoderDecoderCache: its layers take an encoder's states once, are
            sealed by the first read after that, and are read packed. Layers that the config names so
            (`cross_attention_layers`, as Mllama's does) are it in any case.

    The kv4 attention (`attn_implementation="kv4"`, kv4.hf.attach) reads the packed pages; any other attention gets
    dequantised tensors. Layers without plain keys and values (linear attention, convolutions, ...) are those of
    transformers' DynamicCache; a warning names those of them that hold keys and values uncompressed. copy.deepcopy
    shares sealed pages; a pickle holds what `save(seal=False)` writes.

    It is a subclass of DynamicCache, which libraries check for (peft), and grows like one.

    Errors: ValueError for an argument that does not fit; the first update raises NotImplementedError or ValueError,
    with the core's reason, where the recipe does not serve the model's head dims.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        recipe: Recipe | None = None,
        *,
        lambda_k: Any = None,
        lambda_v: Any = None,
        matrix_k: Any = None,
        matrix_v: Any = None,
        bits: Any = None,
        cross_attention: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(mismatch("config", "a transformers PreTrainedConfig", type(config).__name__))
        if recipe is None:
            recipe = Recipe()
        elif not isinstance(recipe, Recipe):
            raise ValueError(mismatch("recipe", "a kv4.Recipe or None", type(recipe).__name__))
        decoder = config.get_text_config(decoder=True)
        kinds = served_kinds(decoder)
        crossing = range(len(kinds)) if cross_attention else getattr(decoder, "cross_attention_layers", None) or ()
        given = {"lambda_k": lambda_k, "lambda_v": lambda_v, "matrix_k": matrix_k, "matrix_v": matrix_v}
        constants = per_layer(given, len(kinds), _matrix)
        recipes = recipes_of(recipe, bits, len(kinds))
        packed = [i for i, (layer_type, _) in enumerate(kinds) if layer_type in PACKED_LAYER_TYPES]
        ranks = {i: (rank, len(packed)) for rank, i in enumerate(packed)}
        layers = [
            (KV4HybridLayer if layer_type in HYBRID_LAYER_TYPES else KV4Layer)(
                recipes[i],
                constants=constants[i],
                layer_type=layer_type,
                cross_attention=i in crossing,
                rank=ranks.get(i, (0, 1)),
                **arguments,
            )
            if layer_type in PACKED_LAYER_TYPES
            else DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**arguments)
            for i, (layer_type, arguments) in enumerate(kinds)
        ]
        Cache.__init__(self, layers=layers)  # DynamicCache's own would make its layers
        self.recipe = recipe

    def save(self, path: str | os.PathLike[str], *, seal: bool = True) -> None:
        """Writes every layer to one file, from which `load` goes on in another process as this cache would here.

        seal: write what is due as pages already, as the next update would make them, for the smallest file; only a
            crop into the tokens of the last call then no longer restores them exactly. False writes all as it is.

        Layers of transformers' own are written by their tensors. An interrupted save leaves the file that was at
        `path` before. Errors: OSError; NotImplementedError for a layer of transformers' own that holds more than
        tensors and numbers."""
        saved.save(self.layers, self.recipe, path, seal)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        recipe: Recipe | None = None,
        *,
        device: Any = "cpu",
        **given: Any,
    ) -> KV4Cache:
        """A cache that goes on where the saved one stopped.

        config, given (lambda_k, lambda_v, matrix_k, matrix_v): as the constructor takes them, and as the saved cache
            had them. bits: None takes those in the file. recipe: None takes the one in it; any other has to be it.
        device: of the layers, or a list with one for each; it may be another than the saved cache was on.

        Errors: OSError; ValueError naming what differs from the saved cache, or for a damaged file; NotImplementedError
        where a device other than the CPU does not serve the saved recipe or head dims."""
        with files.reading(path) as (header, source):
            recorded = Recipe.from_dict(header["recipe"])
            given.setdefault("bits", saved.bits_of(header["layers"]))
            cache = cls(config, recorded if recipe is None else recipe, **given)
            if (message := files.first_difference(cache.recipe.to_dict(), header["recipe"], "recipe")) is not None:
                raise ValueError(message)
            saved.fill(cache.layers, header["layers"], source, device)
        return cache

    @property
    def is_compileable(self) -> bool:
        """False: generate() must not compile around a cache that grows."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Per layer: it has a state and no keys and values."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, KV4Layer)
            for layer in self.layers
        ]

    def packed_layers(self) -> list[KV4Layer]:
        """The layers kept in the kv4 core, in order."""
        return [layer for layer in self.layers if isinstance(layer, KV4Layer)]

    def nbytes(self) -> int:
        """Every byte held: packed pages with their slack, exact tokens, tables and statistics, and the tensors of
        all other layers. Tables that layers share (a rotation's) count once for the cache, though caches share them."""
        return report.nbytes(self.layers)

    def seal(self) -> None:
        """Seals now, in every packed layer, what the next update would: for a cache that is set aside, such as a stored
        prompt, which then takes no more memory than in use. Generation continues unchanged. The only loss: a crop into
        the tokens of the last call no longer restores them exactly."""
        for layer in self.packed_layers():
            layer.seal()

    def describe(self) -> list[dict[str, Any]]:
        """One dict per layer: index, type, nbytes and, for packed layers, tokens (seen by each sequence), shared (of
        nbytes, what other layers may use as well: KV4Cache.nbytes() counts that once), first (smallest position still
        held), sealed and exact (tokens per sequence), kv_heads, head_dim (k, v), sliding_window (0 = none), dtype."""
        return report.describe(self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest -tokens_to_remove tokens of every layer, or of none where one refuses; see
        KV4Layer.crop. Cross-attention layers stay: their tokens are an encoder's."""
        packed = [layer for layer in self.packed_layers() if not layer.cross_attention]
        for layer in packed:
            layer.checked_crop(tokens_to_remove)
        # Only sliding layers (for eviction), those with a state and transformers' own can refuse from here on: they go
        # first, and where one may refuse after another has been cropped, the packed ones keep a copy to go back to.
        sliding = [layer for layer in packed if layer.is_sliding or isinstance(layer, KV4HybridLayer)]
        others = [layer for layer in self.layers if not isinstance(layer, KV4Layer)]
        kept = []
        mixed = others or any(isinstance(layer, KV4HybridLayer) for layer in packed)
        if tokens_to_remove and (mixed or len({layer.sliding_window for layer in sliding}) > 1):
            kept = [(layer, copy.deepcopy(layer)) for layer in sliding]
        try:
            for layer in (*sliding, *others):
                layer.crop(tokens_to_remove)
        except Exception:
            for layer, before in kept:
                number, version = layer.number, layer.version
                layer.__dict__.update(before.__dict__)
                layer.number, layer.version = number, version + 1
            raise
        for layer in packed:
            if layer not in sliding:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i continues old sequence beam_idx[i] in every layer. Errors: IndexError for a row out of range."""
        rows = row_numbers("beam_idx", beam_idx)
        for layer in self.layers:
            if isinstance(layer, KV4Layer):
                layer.select(rows)
            else:
                layer.reorder_cache(torch.as_tensor(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences that an index, a mask or a slice of the batch names, in every layer."""
        if batch := max((layer.batch for layer in self.packed_layers()), default=0):
            self.reorder_cache(torch.tensor(rows_of_index(indices, batch), dtype=torch.long))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Puts `repeats` copies of every sequence side by side, in every layer. Errors: ValueError for fewer than 1."""
        repeats = whole_number("repeats", repeats)
        if repeats < 1:
            raise ValueError(mismatch("repeats", "at least 1", repeats))
        if batch := max((layer.batch for layer in self.packed_layers()), default=0):
            self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def __repr__(self) -> str:
        tokens = max((layer.seen for layer in self.packed_layers()), default=0)
        return f"KV4Cache(layers={len(self.layers)}, tokens={tokens}, nbytes={self.nbytes()}, recipe={self.recipe!r})"


def _matrix(given: Any) -> torch.Tensor:
    """As the core reads one: float32, contiguous, in CPU memory."""
    return torch.as_tensor(given).detach().to("cpu", torch.float32).contiguous()
