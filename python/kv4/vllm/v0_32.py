"""vLLM 0.32: how a page is declared to its block allocator.

A block of vLLM is a page of 64 tokens, all KV heads; vLLM puts layers of different page sizes into groups of blocks of
one size.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kv4 import Recipe
from kv4.vllm.backend import format_of
from kv4.vllm.layers import CommonBackend, LayerImpl
from kv4.vllm.rows import RowsLayer
from kv4.vllm.steps import PAGE


class Backend(CommonBackend):
    """Layers of exact rows."""

    @staticmethod
    def get_impl_cls() -> type[LayerImpl]:
        return Layer

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return dataclasses.replace(spec, block_size=PAGE)


@cache
def packed_backend(recipe: Recipe) -> type[Backend]:
    """The backend class of layers whose blocks are packed pages of that recipe."""

    class Packed(Backend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            if spec.state_content_bytes is None:
                pages = format_of(recipe, spec.dtype, spec.num_kv_heads, spec.head_size, spec.head_size_v, "cpu")
                spec = dataclasses.replace(spec, dtype=torch.int8, state_content_bytes=pages.head_bytes // PAGE)
            return dataclasses.replace(spec, block_size=PAGE)

    return Packed


class Layer(LayerImpl):
    def declare(self, layer: Attention) -> RowsLayer:
        layer.attn_backend = packed_backend(self.recipe)
        return RowsLayer(layer, self, Backend)
