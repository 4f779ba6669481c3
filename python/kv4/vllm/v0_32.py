"""vLLM 0.32: how a page is declared to its block allocator, the layers of exact rows beside it, and what is refused.

A block of vLLM is a page of 64 tokens, all KV heads. The exact rows are cache layers of their own, in the same
allocator: sliding windows of 129 tokens that keep their first block too, for the sinks. vLLM puts layers of different
page sizes into groups of blocks of one size, gives blocks back as the window moves on, and caches both by prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kv4 import Recipe
from kv4.messages import mismatch
from kv4.vllm.backend import Builder, Impl, format_of
from kv4.vllm.lambdas import Kept, check_fit, digest_of, own_heads
from kv4.vllm.settings import calibration_of, recipe_of
from kv4.vllm.steps import PAGE

# A query reads at most 127 tokens behind it from exact rows; blocks go back whole.
ROWS_WINDOW = 2 * PAGE + 1
# Read once a server, not by every layer: each goes through the model's files.
_check_fit, _digest_of = cache(check_fit), cache(digest_of)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class RowsManager(SlidingWindowManager):
    """A sliding window whose first block stays: the sinks."""

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


# vLLM registers its own kinds of layers when it is first asked for one and there is none yet: they go before this one.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


@register_kv_cache_spec(manager_class=RowsManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsSpec(SlidingWindowSpec):
    """Blocks of exact rows [kv_heads, 64, keys then values]."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + 1

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(isinstance(spec, RowsSpec) for spec in kv_cache_specs.values())


class Backend(AttentionBackend):
    forward_includes_kv_cache_update = True
    supported_dtypes = DTYPES

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return LayerImpl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 2 == 0 and 32 <= head_size <= 512

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


class RowsLayer(AttentionLayerBase):
    """The exact rows of an attention layer, as a layer of vLLM's."""

    def __init__(self, layer: Attention) -> None:
        self.num_heads = layer.num_heads
        self.kv_cache = torch.tensor([])
        self._spec = RowsSpec(
            block_size=PAGE,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            head_size_v=layer.head_size_v,
            dtype=layer.kv_cache_torch_dtype,
            sliding_window=ROWS_WINDOW,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> RowsSpec:
        return self._spec


class LayerImpl(Impl):
    """One attention layer. The rows' layer joins vLLM's list of layers as soon as the model is there."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        refuse_layer(alibi_slopes, kv_cache_dtype, attn_type, kv_sharing_target_layer_name, head_size, more)
        refuse_server(config)
        super().__init__(
            recipe=recipe_of(config.additional_config),
            heads=num_heads,
            kv_heads=num_kv_heads or num_heads,
            dim=head_size,
            scale=scale,
            window=sliding_window or 0,
            softcap=logits_soft_cap or 0.0,
            sink_logits=sinks,
        )
        self.kv_cache_dtype = kv_cache_dtype
        self._layers = config.compilation_config.static_forward_context
        self._lambda = partial(lambda_of, config, self.recipe, self.num_kv_heads, head_size) if self.sealing else None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if not self.sealing or self.rows_name is not None:
            return
        name, layer = next((n, x) for n, x in self._layers.items() if getattr(x, "impl", None) is self)
        found, self.kept = self._lambda(name)
        if found is not None:
            self.lambda_k = found.to(current_platform.device_type)
        layer.attn_backend = packed_backend(self.recipe)
        self.rows_name = f"{name}.kv4_rows"
        self._layers[self.rows_name] = RowsLayer(layer)

    def rows_cache(self) -> torch.Tensor:
        return self._layers[self.rows_name].kv_cache


def lambda_of(
    config: Any, recipe: Recipe, kv_heads: int, head_dim: int, layer: str
) -> tuple[torch.Tensor | None, Kept | None]:
    """Of a layer by vLLM's name, this rank's heads: the calibration's, else what an earlier start kept; and, where it
    is yet to be measured, where it goes."""
    if recipe.key.lambda_ == "none":
        return None, None
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    calibration = calibration_of(config.additional_config)
    if calibration is not None:
        found = calibration.lambda_of("key", extract_layer_index(layer))
        return found[own_heads(len(found), rank, ranks)].float().contiguous(), None
    model = config.model_config
    digest = _digest_of(model.model, model.revision, model.hf_config.to_json_string())
    kept = Kept(digest, recipe, layer, rank, ranks)
    known = kept.load(kv_heads, head_dim)
    return (None, kept) if known is None else (torch.from_numpy(known), None)


def refuse_layer(alibi: Any, cache_dtype: str, kind: str, shared: str | None, dim: int, more: dict[str, Any]) -> None:
    """Raises NotImplementedError for a layer that kv4 does not serve, before any weight is read."""
    checks = [
        (alibi is None, "alibi_slopes", "none", "some"),
        (cache_dtype in ("auto", "float16", "bfloat16"), "kv_cache_dtype", "auto", cache_dtype),
        (kind == AttentionType.DECODER, "attention type", "decoder", kind),
        (shared is None, "kv_sharing_target_layer_name", "none: every layer with a cache of its own", shared),
        (Backend.supports_head_size(dim), "head_size", "an even number from 32 to 512", dim),
        (not more, "attention", "nothing else than kv4 knows", ", ".join(more)),
    ]
    for fits, name, expected, got in checks:
        if not fits:
            raise NotImplementedError(mismatch(name, expected, got))


def refuse_server(config: Any) -> None:
    """Raises NotImplementedError for what the server was asked to do beside, as above; ValueError for a calibration of
    another model."""
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    decode, prefill = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    method = getattr(config.speculative_config, "method", None)
    block = cache.block_size if cache.user_specified_block_size else PAGE
    checks = [
        (block == PAGE, "block_size", f"{PAGE}, a page", block),
        (config.kv_transfer_config is None, "kv_transfer_config", "none: exact rows do not travel", "one"),
        (
            method in (None, "ngram", "suffix"),
            "speculative_config.method",
            "ngram or suffix: no draft model",
            method,
        ),
        (decode == 1, "decode_context_parallel_size", 1, decode),
        (prefill == 1, "prefill_context_parallel_size", 1, prefill),
        (not model.is_hybrid, "model", "attention layers alone", "a hybrid model, with states of another kind"),
        (not config.scheduler_config.disable_hybrid_kv_cache_manager, "disable_hybrid_kv_cache_manager", False, True),
    ]
    for fits, name, expected, got in checks:
        if not fits:
            raise NotImplementedError(mismatch(name, expected, got))
    calibration = calibration_of(config.additional_config)
    if calibration is not None:
        layers, heads = model.hf_text_config.num_hidden_layers, model.get_total_num_kv_heads()
        _check_fit(calibration, layers, heads, model.get_head_size(), model.model)
