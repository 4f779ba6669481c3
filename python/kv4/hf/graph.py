"""Decode steps replayed as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from kv4.messages import mismatch

from .cache import CACHE_ARGUMENT, KV4Cache
from .device import place
from .layer import KV4Layer
from .mask import leading_padding, row_mask


class DecodeGraph:
    """Decode steps of an attached model on a KV4Cache, each a replay of one captured step: the host queues one graph
    in place of every layer's kernels.

        logits = model(ids, past_key_values=cache).logits      # prefill, as always
        step = DecodeGraph(model, cache)
        for _ in range(n):
            logits = step(logits[:, -1:].argmax(-1))

    The first step runs in eager mode, the next is captured, as soon as every layer that learns lambda by itself has
    sealed its first page (about 132 tokens); until then steps stay eager. In between, the host seals what is due, so a
    replayed step stores what an eager one would. Room for `reserve` more tokens is taken at each capture. The cache may
    also be used in eager mode, cropped or reordered between steps: the next step is captured anew.

    Errors: ValueError for a model that is not on one CUDA device under the kv4 attention, a cache with other layers
    than packed ones or one that is empty, padding elsewhere than on the left. `attention_mask` [batch, cached tokens],
    nonzero = a real token, marks padding; rows keep it for as long as the graph is used.
    """

    def __init__(
        self, model: Any, cache: KV4Cache, *, reserve: int = 1024, attention_mask: torch.Tensor | None = None
    ) -> None:
        if not isinstance(cache, KV4Cache) or len(cache.packed_layers()) != len(cache.layers):
            raise ValueError(mismatch("cache", "a KV4Cache whose layers are all packed", repr(cache)))
        if model.device.type != "cuda":
            raise ValueError(mismatch("model", "a model on a CUDA device", f"one on {place(model.device)}"))
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        if attention != "kv4":
            raise ValueError(mismatch("model", "one under the kv4 attention (kv4.hf.attach)", attention))
        if not cache.get_seq_length():
            raise ValueError(mismatch("cache", "a prefilled cache", "an empty one"))
        if reserve < 1:
            raise ValueError(mismatch("reserve", "at least 1", reserve))
        self.model, self.cache, self.reserve = model, cache, reserve
        self.captured = 0  # steps captured so far
        self._start, self._padding = _starts(cache, attention_mask)
        if self._start is not None:
            self._start = self._start.to(model.device)[:, None]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._versions: list[int] = []
        self._left = 0
        self._eager_steps = 0

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [batch, 1] -> logits [batch, 1, vocabulary], overwritten by the next step."""
        layers = self.cache.packed_layers()
        if tokens.dim() != 2 or tuple(tokens.shape) != (layers[0].batch, 1):
            raise ValueError(mismatch("tokens", f"shape [{layers[0].batch}, 1]", tokens))
        if self._graph is None or self._left == 0 or self._versions != [layer.version for layer in layers]:
            self._graph = None
            # A capture takes over the rows' starts from the step before it.
            fresh = self._padding is None or self._versions == [layer.version for layer in layers]
            if not self._eager_steps or not fresh or not all(_lambda_fixed(layer) for layer in layers):
                self._eager_steps += 1
                logits = self._step(tokens, torch.full_like(tokens, self.cache.get_seq_length()))
                self._versions = [layer.version for layer in layers]
                return logits
            self._capture(tokens, layers)
        self._tokens.copy_(tokens)
        for layer in layers:
            layer.advance()
        self._graph.replay()
        self._left -= 1
        self._versions = [layer.version for layer in layers]
        return self._logits

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of one call of the model; positions int64 [batch, 1], padding counted."""
        inputs = {"input_ids": tokens, CACHE_ARGUMENT: self.cache, "use_cache": True, "logits_to_keep": 1}
        if self._padding is not None:
            inputs["attention_mask"], positions = self._padding, positions - self._start
        return self.model(position_ids=positions, **inputs).logits

    def _capture(self, tokens: torch.Tensor, layers: list[KV4Layer]) -> None:
        for layer in layers:
            layer.reserve(self.reserve)
        self._left = self.reserve
        self._tokens = tokens.clone()
        self._positions = torch.full_like(tokens, self.cache.get_seq_length())
        before = [(layer.seen, layer.version) for layer in layers]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._logits = self._step(self._tokens, self._positions)
                self._positions += 1
        finally:
            # The core has counted nothing while its kernels were captured.
            for layer, counts in zip(layers, before, strict=True):
                layer.seen, layer.version = counts
                layer.disown()
        self._graph = graph
        self.captured += 1


def _starts(
    cache: KV4Cache, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """First real position of each row, int64 [batch], and the mask that marks them; None where no row is padded."""
    if attention_mask is None:
        return None, None
    batch, tokens = cache.packed_layers()[0].batch, cache.get_seq_length()
    if tuple(attention_mask.shape) != (batch, tokens):
        raise ValueError(mismatch("attention_mask", f"shape [{batch}, {tokens}]", attention_mask))
    start = leading_padding(attention_mask, tokens, 0)
    if start is None:
        raise ValueError(mismatch("attention_mask", "padding on the left alone", "a hidden token behind a visible one"))
    if start is True:
        return None, None
    padding = row_mask(batch, start, 0)
    padding.kv4_positions = True
    return start, padding


def _lambda_fixed(layer: KV4Layer) -> bool:
    return all(layer.core.lambda_fixed(row) for row in range(layer.batch))
