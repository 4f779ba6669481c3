"""vLLM 0.32: how a page is declared to its block allocator.

A block of vLLM is a page of 64 tokens, all KV heads; vLLM puts layers of different page sizes into groups of blocks of
one size.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kv4 import Recipe
from kv4.vllm.backend import Builder, format_of
from kv4.vllm.layers import DTYPES, LayerImpl, serves_head_size
from kv4.vllm.rows import RowsLayer
from kv4.vllm.steps import PAGE


class Backend(AttentionBackend):
    forward_includes_kv_cache_update = True
    supported_dtypes = DTYPES

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LayerImpl]:
        return Layer

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return serves_head_size(head_size)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

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
