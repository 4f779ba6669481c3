"""vLLM 0.26: how a page is declared to its block allocator.

All layers' blocks have the same size in this version. A block of exact rows is padded to a whole number of pages, and a
block of pages holds that many: 4 pages, 256 tokens, for a 16-bit model. Kernels see single pages, since vLLM splits
blocks for them.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from kv4.vllm.backend import format_of
from kv4.vllm.layers import CommonBackend, LayerImpl
from kv4.vllm.rows import RowsLayer
from kv4.vllm.steps import PAGE


class Backend(CommonBackend):
    """Layers of exact rows."""

    @staticmethod
    def get_impl_cls() -> type[LayerImpl]:
        return Layer

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


@cache
def packed_backend(head_bytes: int) -> type[Backend]:
    """The backend class of layers whose blocks are packed pages, of so many bytes a KV head."""

    class Packed(Backend):
        @staticmethod
        def get_kv_cache_shape(
            num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
        ) -> tuple[int, ...]:
            return num_blocks, num_kv_heads, block_size, head_bytes // PAGE

    return Packed


class _Pages:
    """A block's bytes, which are pages instead of rows."""

    @property
    def real_page_size_bytes(self) -> int:
        return self.block_size // PAGE * self.page_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return dataclasses.replace(super().merge(specs), page_bytes=specs[0].page_bytes)


@register_kv_cache_spec(manager_class=FullAttentionManager, uniform_type_base_spec=FullAttentionSpec)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagesSpec(_Pages, FullAttentionSpec):
    page_bytes: int = 0


@register_kv_cache_spec(manager_class=SlidingWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPagesSpec(_Pages, SlidingWindowSpec):
    page_bytes: int = 0


def pages_spec(layer: Attention, head_bytes: int) -> PagesSpec | WindowPagesSpec:
    shape = {
        "block_size": PAGE,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "head_size_v": layer.head_size_v,
        "dtype": torch.int8,
        "page_bytes": layer.num_kv_heads * head_bytes,
    }
    if layer.sliding_window is None:
        return PagesSpec(**shape)
    return WindowPagesSpec(sliding_window=layer.sliding_window, **shape)


class Layer(LayerImpl):
    def declare(self, layer: Attention) -> RowsLayer:
        dtype, dims = layer.kv_cache_torch_dtype, (layer.num_kv_heads, layer.head_size, layer.head_size_v)
        pages = format_of(self.recipe, dtype, *dims, "cpu")
        spec = pages_spec(layer, pages.head_bytes)
        layer.attn_backend = packed_backend(pages.head_bytes)
        layer.get_kv_cache_spec = lambda config: spec
        # Blocks of rows are padded to a multiple of a page's bytes.
        return RowsLayer(layer, self, Backend, padded=-(-pages.block_bytes // spec.page_bytes) * spec.page_bytes)
