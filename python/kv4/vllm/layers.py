"""An attention layer of vLLM served by kv4: its arguments, its lambda, and refusals before weights are read."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from kv4 import Recipe
from kv4.messages import mismatch
from kv4.vllm import flash
from kv4.vllm.backend import Builder, Impl
from kv4.vllm.lambdas import Kept, check_fit, digest_of, own_heads
from kv4.vllm.rows import RowsLayer
from kv4.vllm.settings import calibration_of, recipe_of
from kv4.vllm.steps import PAGE

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Read once per server, not per layer: every read goes through the model's files.
_check_fit, _digest_of = cache(check_fit), cache(digest_of)


def serves_head_size(size: int) -> bool:
    return size % 2 == 0 and 32 <= size <= 512


class CommonBackend(AttentionBackend):
    """The properties that kv4 reports to every version of vLLM."""

    forward_includes_kv_cache_update = True
    supported_dtypes = DTYPES

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

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


class LayerImpl(Impl):
    """One attention layer. The layer of its exact rows joins vLLM's list of layers once the model is built."""

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
            flash_version=flash.version_for(config.model_config),
        )
        self.kv_cache_dtype = kv_cache_dtype
        self._layers = config.compilation_config.static_forward_context
        self._lambda = partial(lambda_of, config, self.recipe, self.num_kv_heads, head_size) if self.sealing else None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if not self.sealing or self.rows_name is not None:
            return
        name, layer = next((n, x) for n, x in self._layers.items() if getattr(x, "impl", None) is self)
        found, self.kept = self._lambda(name)
        if self.kept is not None:
            self.unmeasured, found = True, torch.ones(self.num_kv_heads, self.head_size, dtype=torch.float32)
        if found is not None:
            self.lambda_k = found.to(current_platform.device_type)
        rows = self.declare(layer)
        self.rows_name = f"{name}.kv4_rows"
        self._layers[self.rows_name] = rows

    def declare(self, layer: Attention) -> RowsLayer:
        """Turns vLLM's layer into one of packed pages, and adds a layer of exact rows."""
        raise NotImplementedError

    def rows_cache(self) -> torch.Tensor:
        return self._layers[self.rows_name].kv_cache


def lambda_of(
    config: Any, recipe: Recipe, kv_heads: int, head_dim: int, layer: str
) -> tuple[torch.Tensor | None, Kept | None]:
    """Lambda of a layer (by vLLM's name) for this rank's heads, from the calibration, else from an earlier start; and,
    where it still has to be measured, the file to keep it in."""
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
        (serves_head_size(dim), "head_size", "an even number from 32 to 512", dim),
        (not more, "attention", "nothing else than kv4 knows", ", ".join(more)),
    ]
    for fits, name, expected, got in checks:
        if not fits:
            raise NotImplementedError(mismatch(name, expected, got))


def refuse_server(config: Any) -> None:
    """Raises NotImplementedError for features of the server that kv4 does not support, and ValueError for a calibration
    of another model, before any weight is read."""
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
