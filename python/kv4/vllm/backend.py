"""Attention of a layer through kv4, and a step's metadata, for any version of vLLM's v1 engine.

A step of a layer: new rows into their blocks, pages that became full sealed, all queries attended to. Prompts and
single tokens are served by the same calls. Lambda is that of a calibration or of an earlier start, else measured on the
first queries and fixed before the first page is sealed; from then on a page's bytes follow from its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from kv4 import Recipe, _core
from kv4.vllm.lambdas import Kept
from kv4.vllm.settings import recipe_of
from kv4.vllm.steps import PAGE, Step, plan

# Queries that lambda is measured on, at most.
MOST_MEASURED = 512


@cache
def format_of(recipe: Recipe, dtype: torch.dtype, kv_heads: int, dim_k: int, dim_v: int, backend: str) -> Any:
    """The page format of layers alike. Exact rows alone need one too: it attends."""
    sealing = recipe if recipe.seal == "page" else Recipe()
    name = str(dtype).removeprefix("torch.")
    return _core.PageFormat(sealing, dtype=name, kv_heads=kv_heads, head_dim_k=dim_k, head_dim_v=dim_v, backend=backend)


class Workspaces:
    """One workspace a device, of the largest call so far: layers run one after another."""

    def __init__(self) -> None:
        self._held: dict[torch.device, torch.Tensor] = {}

    def of(self, pages: Any, step: Step, q_heads: int, device: torch.device, stream: int) -> torch.Tensor:
        bytes_ = pages.workspace_bytes(q_heads=q_heads, **step.limits)
        held = self._held.get(device)
        if held is None or held.numel() < bytes_:
            held = self._held[device] = torch.empty(bytes_, dtype=torch.uint8, device=device)
            pages.prepare(held, stream=stream)
        return held


_workspaces = Workspaces()


@dataclass
class Metadata:
    """A step as the layers of one group of blocks see it."""

    step: Step
    table: torch.Tensor  # [n, entries] int32 block ids, vLLM's own
    pieces: torch.Tensor  # [p, entries] the same for each piece
    tensors: dict[str, torch.Tensor]  # the step's arrays on the device
    num_actual_tokens: int


class Builder(AttentionMetadataBuilder[Metadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._sealing = recipe_of(vllm_config.additional_config).seal == "page"
        self._drafts = vllm_config.speculative_config is not None

    # Groups of blocks ask one after another for the same step.
    _last: tuple[bytes, Step, dict[str, torch.Tensor]] | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        queries = common.query_start_loc_cpu.numpy()
        # An upper bound counts tokens that a draft model may yet lose; pages and exact rows follow from true lengths.
        bound = None if self._drafts else common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if bound is None else bound).numpy()
        key = queries.tobytes() + lengths.tobytes() + bytes([self._sealing])
        last = Builder._last
        if last is None or last[0] != key:
            step = plan(queries, lengths, self._sealing)
            arrays = ("queries", "lengths", "begin", "end", "source", "piece_queries", "piece_lengths", "piece_sealed")
            tensors = {name: torch.from_numpy(getattr(step, name)).to(self.device) for name in arrays}
            tensors["zeros"] = torch.zeros_like(tensors["lengths"])
            last = Builder._last = (key, step, tensors)
        _, step, tensors = last
        table = common.block_table_tensor
        return Metadata(step, table, table.index_select(0, tensors["source"]), tensors, common.num_actual_tokens)


class Impl(AttentionImpl[Metadata]):
    """A layer. `rows_name`: the layer of exact rows beside it, None where all rows are exact, in its own blocks."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        heads: int,
        kv_heads: int,
        dim: int,
        scale: float,
        window: int,
        softcap: float,
        sink_logits: torch.Tensor | None,
    ) -> None:
        self.recipe = recipe
        self.num_heads, self.num_kv_heads, self.head_size = heads, kv_heads, dim
        self.scale, self.window, self.softcap = float(scale), int(window), float(softcap)
        self.sinks = None if sink_logits is None else sink_logits.float()
        self.sealing = recipe.seal == "page"
        self.rows_name: str | None = None
        self.lambda_k: torch.Tensor | None = None
        self.kept: Kept | None = None  # where a measured lambda goes
        self._measured: list[torch.Tensor] = []
        self._memory: Any = None
        self._memory_of: tuple[int, ...] = ()

    def rows_cache(self) -> torch.Tensor:
        """[blocks, kv_heads, 64, keys then values] of the layer of exact rows."""
        raise NotImplementedError

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None or kv_cache.numel() == 0:  # the model is being measured, without a cache
            return output.zero_()
        meta, step, on = attn_metadata, attn_metadata.step, attn_metadata.tensors
        rows_meta = self._metadata_of_rows(meta)
        device, rows = query.device, step.rows
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        pages = format_of(self.recipe, key.dtype, self.num_kv_heads, self.head_size, self.head_size, _backend(device))
        memory = self._memory_for(pages, kv_cache)
        whole, pieces = self._tables(pages, meta, rows_meta)
        work = _workspaces.of(pages, step, self.num_heads, device, stream)
        pages.store(whole, memory, _rows(key, rows), _rows(value, rows), work, stream=stream)
        if self.sealing and self.recipe.key.lambda_ == "auto" and self.lambda_k is None:
            self._measure(pages, query[:rows], rows_meta, stream)
            memory = self._memory_for(pages, kv_cache)
        if step.most_pages:
            pages.seal(whole, memory, on["begin"], on["end"], step.most_pages, work, stream=stream)
        pages.attend(
            pieces,
            memory,
            _rows(query, rows),
            _rows(output, rows),
            work,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sinks,
            stream=stream,
        )
        return output

    def _metadata_of_rows(self, meta: Metadata) -> Metadata:
        if self.rows_name is None:
            return meta
        return get_forward_context().attn_metadata[self.rows_name]

    def _memory_for(self, pages: Any, kv_cache: torch.Tensor) -> Any:
        """What kv4 calls a layer's memory: made again only where it moved, or once lambda is known."""
        held = kv_cache if self.rows_name is None else self.rows_cache()
        identity = (kv_cache.data_ptr(), held.data_ptr(), id(self.lambda_k))
        if self._memory_of != identity:
            k, v = held[..., : self.head_size], held[..., self.head_size :]
            packed = None
            if self.rows_name is not None:
                blocks, heads, tokens, content = kv_cache.shape
                packed = kv_cache.as_strided((blocks, heads, tokens * content), (*kv_cache.stride()[:2], 1))
            self._memory = pages.memory(packed, k, v, lambda_k=self.lambda_k)
            self._memory_of = identity
        return self._memory

    def _tables(self, pages: Any, meta: Metadata, rows: Metadata) -> tuple[Any, Any]:
        """Of whole sequences, to store and seal, and of the pieces to attend to: one for layers of the same blocks."""
        key = (id(meta), id(rows), self.window)
        found = meta.step.kept.get(key)
        if found is None:
            on = meta.tensors
            sinks = self.recipe.sinks if self.sealing else 0
            most = int(np.diff(meta.step.queries).max(initial=0))
            longest, all_ = int(meta.step.lengths.max(initial=0)), int(meta.step.piece_lengths.sum(dtype=np.int64))
            limits = {"longest": longest, "all": all_, "window": self.window, "sink_tokens": sinks}
            whole = pages.tables(
                on["queries"],
                on["lengths"],
                on["zeros"],
                meta.table,
                rows.table,
                sinks=rows.table[:, 0].contiguous() if sinks else None,
                most_queries=most,
                **limits,
            )
            pieces = pages.tables(
                on["piece_queries"],
                on["piece_lengths"],
                on["piece_sealed"],
                meta.pieces,
                rows.pieces,
                sinks=rows.pieces[:, 0].contiguous() if sinks else None,
                most_queries=min(most, PAGE) if self.sealing else most,
                **limits,
            )
            # The metadata stay alive with what was made of them: their ids name nothing else.
            found = meta.step.kept[key] = (whole, pieces, meta, rows)
        return found[:2]

    def _measure(self, pages: Any, queries: torch.Tensor, rows: Metadata, stream: int) -> None:
        """Keeps queries until a page is full; then lambda is that of them and of the first sequence's full pages."""
        self._measured.append(queries[-MOST_MEASURED:].clone())
        step = rows.step
        if not step.most_pages:
            kept = torch.cat(self._measured)[-MOST_MEASURED:]
            self._measured = [kept]
            return
        b = int(np.argmax(step.end - step.begin))
        blocks = rows.table[b, int(step.begin[b]) // PAGE : int(step.end[b]) // PAGE]
        held = self.rows_cache()
        keys = held.index_select(0, blocks)[..., : self.head_size]  # [n, kv_heads, 64, dim]
        keys = keys.transpose(0, 1).reshape(1, self.num_kv_heads, -1, self.head_size)
        found = torch.empty(self.num_kv_heads, self.head_size, device=queries.device)
        pages.learn_lambda(_rows(torch.cat(self._measured), None), keys, found, stream=stream)
        self.lambda_k, self._measured = found, []
        if self.kept is not None:
            self.kept.save(found.cpu().numpy())


def _rows(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """[rows, heads, dim] as [1, heads, count, dim], without a copy."""
    return x[:count].transpose(0, 1).unsqueeze(0)


def _backend(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
