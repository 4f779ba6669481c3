"""The exact rows of attention layers as cache layers of their own, in vLLM's block allocator.

They are sliding windows of 129 tokens that also keep their first block, for the sinks. vLLM frees blocks as the window
advances, and caches them by prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kv4.vllm.steps import PAGE

# A query reads at most the 127 tokens before it from exact rows; blocks are freed whole.
ROWS_WINDOW = 2 * PAGE + 1


class RowsManager(SlidingWindowManager):
    """A sliding window that keeps its first block, which holds the sinks."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Any,
        block_pool: Any,
        kv_cache_spec: Any,
        **rest: Any,
    ) -> tuple[tuple[list, ...], int]:
        found, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            **rest,
        )
        if length and found[0][0].is_null:
            hashes = resolve_block_hashes(
                block_hashes,
                block_pool.hash_block_size,
                kv_cache_spec.block_size,
                supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
                alignment_tokens=rest["alignment_tokens"],
            )
            first = block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
            if first is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, first, strict=True):
                blocks[0] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, *args: Any, **rest: Any) -> list[bool] | None:
        mask = super().reachable_block_mask(start_block, end_block, *args, **rest)
        if mask and start_block == 0:
            mask[0] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        computed: int,
        *args: Any,
        **rest: Any,
    ) -> int:
        count = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, computed, *args, **rest)
        if new_computed_blocks and self.get_num_skipped_tokens(computed) >= self.block_size:
            count += self._get_num_evictable_blocks(new_computed_blocks[:1])
        return count

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **rest: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **rest)
        held = self.req_to_blocks[request_id]
        if held and held[0].is_null and not new_computed_blocks[0].is_null:
            self.block_pool.touch(new_computed_blocks[:1])
            held[0] = new_computed_blocks[0]

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        super()._remove_blocks_in_range(request_id, max(first_block, 1), last_block)


# vLLM registers its own kinds of layers at the first query, unless some are there already: query before adding one.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


@register_kv_cache_spec(manager_class=RowsManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsSpec(SlidingWindowSpec):
    """Blocks of exact rows: of each KV head 64 keys, then 64 values."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + 1

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(isinstance(spec, RowsSpec) for spec in kv_cache_specs.values())


class RowsLayer(AttentionLayerBase):
    """The exact rows of an attention layer, whose implementation is `owner`, as a layer of vLLM's. `padded`: bytes that
    a block takes, None for those of its rows alone."""

    def __init__(
        self, layer: Attention, owner: Any, backend: type[AttentionBackend], padded: int | None = None
    ) -> None:
        self.owner = owner
        self.num_heads = layer.num_heads
        self.kv_cache = torch.tensor([])
        self._backend = backend
        self._spec = RowsSpec(
            block_size=PAGE,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            head_size_v=layer.head_size_v,
            dtype=layer.kv_cache_torch_dtype,
            sliding_window=ROWS_WINDOW,
            page_size_padded=padded,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> RowsSpec:
        return self._spec
