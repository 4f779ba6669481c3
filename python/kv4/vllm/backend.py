"""Attention of a layer through kv4, and a step's metadata, for any version of vLLM's v1 engine.

A layer's step stores the new rows in their blocks, seals pages that have become full and attends to all queries.
Prompts and single tokens go through the same calls. Lambda comes from a calibration or an earlier start; otherwise it
is measured on the first queries and fixed before the first page is sealed. After that a page's bytes depend only on its
tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from kv4 import Recipe, _core
from kv4.vllm import flash
from kv4.vllm.lambdas import Kept
from kv4.vllm.settings import recipe_of
from kv4.vllm.steps import PAGE, Step, plan

# The most queries that lambda is measured on, and the shortest text whose queries are used.
MOST_MEASURED, LEAST_MEASURED = 512, 16


@cache
def format_of(recipe: Recipe, dtype: torch.dtype, kv_heads: int, dim_k: int, dim_v: int, backend: str) -> Any:
    """The page format of layers with the same shapes. Layers with exact rows only need one too, for attention."""
    sealing = recipe if recipe.seal == "page" else Recipe()
    name = str(dtype).removeprefix("torch.")
    return _core.PageFormat(sealing, dtype=name, kv_heads=kv_heads, head_dim_k=dim_k, head_dim_v=dim_v, backend=backend)


class Workspaces:
    """One workspace per device, as large as the largest call so far, since layers run one after another. Captured
    graphs have one of their own, at a fixed address."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, bool], torch.Tensor] = {}

    def of(self, pages: Any, meta: Metadata, q_heads: int, device: torch.device, stream: int) -> torch.Tensor:
        bytes_ = pages.workspace_bytes(q_heads=q_heads, **meta.workspace)
        held = self._held.get((device, meta.captured))
        if held is None or held.numel() < bytes_:
            held = self._held[device, meta.captured] = torch.empty(bytes_, dtype=torch.uint8, device=device)
            pages.prepare(held, stream=stream)
        return held


_workspaces = Workspaces()


@dataclass
class Metadata:
    """A step's metadata for the layers of one group of blocks."""

    step: Step
    table: Sequence[torch.Tensor]  # [n, entries] int32 block ids, vLLM's own; and [n], a sequence's first
    pieces: Sequence[torch.Tensor]  # [p, entries] and [p], the same for each piece
    tensors: dict[str, torch.Tensor]  # the step's arrays on the device
    parts: list[flash.Run | flash.Chunk]  # prompts that FlashAttention attends to
    num_actual_tokens: int
    most_pages: int  # that become full in one sequence
    limits: dict[str, int]  # tokens of the longest sequence and of all
    workspace: dict[str, int]
    captured: bool = False  # for a graph: limits are those of every replay


class Arrays:
    """A step's arrays on the device, shared by all groups of blocks, which ask for the same step one after another.

    Arrays of steps with one token per sequence keep their addresses, as captured graphs need."""

    NAMES = ("lengths", "begin", "end", "piece_sealed", "queries")
    ZEROS = len(NAMES)

    def __init__(self, most: int, device: torch.device, leave: int | None) -> None:
        self._device, self._leave = device, leave
        self._single = torch.zeros(self.ZEROS + 1, most + 1, dtype=torch.int32, device=device)
        self._last: tuple[bytes, Step, dict[str, torch.Tensor]] | None = None

    def of(self, queries: np.ndarray, lengths: np.ndarray, sealing: bool) -> tuple[Step, dict[str, torch.Tensor]]:
        key = queries.tobytes() + lengths.tobytes() + bytes([sealing])
        if self._last is None or self._last[0] != key:
            step = plan(queries, lengths, sealing, self._leave)
            self._last = key, step, self._fill(step) if step.single else self._copy(step)
        return self._last[1:]

    def parts(self, step: Step) -> list[flash.Run | flash.Chunk]:
        """Computed once per step, like its arrays."""
        if "parts" not in step.kept:
            step.kept["parts"] = flash.parts_of(step, self._device) if step.left.any() else []
        return step.kept["parts"]

    def _copy(self, step: Step) -> dict[str, torch.Tensor]:
        arrays = {name: getattr(step, name) for name in (*self.NAMES, "source", "piece_lengths")}
        arrays |= {f"span{i}": span.queries for i, span in enumerate(step.spans)}
        arrays["zeros"] = np.zeros_like(step.lengths)
        whole = flash.moved(np.concatenate(list(arrays.values())), self._device)  # one copy
        return dict(zip(arrays, whole.split([len(x) for x in arrays.values()]), strict=True))

    def _fill(self, step: Step) -> dict[str, torch.Tensor]:
        n = len(step.lengths)
        staged = torch.zeros(self.ZEROS, n + 1, dtype=torch.int32)
        for row, name in zip(staged.numpy(), self.NAMES, strict=True):
            found = getattr(step, name)
            row[: len(found)] = found
        if self._device.type != "cpu":
            staged = staged.pin_memory()
        self._single[: self.ZEROS, : n + 1].copy_(staged, non_blocking=True)
        tensors = {name: self._single[i, :n] for i, name in enumerate(self.NAMES)}
        tensors["queries"] = self._single[self.NAMES.index("queries"), : n + 1]
        return {
            **tensors,
            "zeros": self._single[self.ZEROS, :n],
            "span0": tensors["queries"],
            "piece_lengths": tensors["lengths"],
        }


# Of an engine and a device, by the engine's configuration.
_arrays: dict[tuple[int, torch.device], Arrays] = {}


def _arrays_of(config: Any, device: torch.device) -> Arrays:
    key = id(config), device
    if key not in _arrays:
        leave = flash.chunks_from(config.model_config)
        _arrays[key] = Arrays(config.scheduler_config.max_num_seqs, device, leave)
        weakref.finalize(config, _arrays.pop, key, None)
    return _arrays[key]


class Builder(AttentionMetadataBuilder[Metadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Sequences that decode come first, then chunks of prompts, then prompts that begin: each kind is one call.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._sealing = recipe_of(vllm_config.additional_config).seal == "page"
        self._drafts = vllm_config.speculative_config is not None
        self._longest = vllm_config.model_config.max_model_len
        self._most = vllm_config.scheduler_config.max_num_seqs
        self._arrays = _arrays_of(vllm_config, device)
        # A fixed address, for captured graphs, of each sequence's first block, which holds the sinks.
        self._first = torch.zeros(self._most, dtype=torch.int32, device=device)
        layers = vllm_config.compilation_config.static_forward_context
        # Layers whose lambda may still have to be measured, which those of exact rows record.
        self._owners = [x.owner for x in map(layers.get, layer_names) if hasattr(x, "owner")]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        # The host's upper bound includes draft tokens that may be rejected; pages and exact rows need true lengths.
        bound = None if self._drafts else common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if bound is None else bound).numpy()
        step, tensors = self._arrays.of(common.query_start_loc_cpu.numpy(), lengths, self._sealing)
        if step.single and step.most_pages and self.device.type != "cpu":
            self._measure_before(step, common.block_table_tensor)
        longest, all_ = int(step.lengths.max(initial=0)), int(step.piece_lengths.sum(dtype=np.int64))
        limits = {"longest": longest, "all": all_}
        # A chunk's pages are unpacked by one call.
        unpacked = -(-longest // PAGE) if step.left.any() else 1
        workspace = {**step.limits, "most_pages": max(step.limits["most_pages"], unpacked)}
        return self._metadata(common, step, tensors, step.most_pages, limits, workspace)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Metadata:
        """Metadata for capturing a step of one token per sequence at any lengths; every sequence may fill a page."""
        common = common_attn_metadata
        queries = common.query_start_loc_cpu.numpy()
        # During capture nothing is stored or read: rows and lengths are empty.
        nothing = np.zeros(len(queries) - 1, np.int32)
        step, tensors = self._arrays.of(np.zeros_like(queries), nothing, self._sealing)
        each, n = {"most_pages": 1, "most_queries": 1, "longest": self._longest}, len(nothing)
        limits = {"longest": self._longest, "all": n * self._longest}
        workspace = {"sequences": self._most, "all": self._most * self._longest, **each}
        return self._metadata(common, step, tensors, int(self._sealing), limits, workspace, captured=True)

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        step: Step,
        tensors: dict[str, torch.Tensor],
        most_pages: int,
        *rest: Any,
        captured: bool = False,
    ) -> Metadata:
        table = common.block_table_tensor
        first = self._first[: len(table)]
        first.copy_(table[:, 0])
        pieces = (table, first) if step.single else [x.index_select(0, tensors["source"]) for x in (table, first)]
        parts = self._arrays.parts(step)
        count = common.num_actual_tokens
        return Metadata(step, (table, first), pieces, tensors, parts, count, most_pages, *rest, captured)

    def _measure_before(self, step: Step, table: torch.Tensor) -> None:
        """Measures lambda before a decode step that fills pages, since a captured graph cannot. The page's last key
        does not exist yet; the previous one is used in its place."""
        owners = [owner for owner in self._owners if owner.unmeasured]
        if owners:
            b = int(np.argmax(step.end - step.begin))
            block = table[b, int(step.begin[b]) // PAGE].long().reshape(1)
            for owner in owners:
                owner.measure(block, missing=1)


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
        flash_version: int | None,
    ) -> None:
        self.recipe = recipe
        self.num_heads, self.num_kv_heads, self.head_size = heads, kv_heads, dim
        self.scale, self.window, self.softcap = float(scale), int(window), float(softcap)
        self.sinks, self._given_sinks = None if sink_logits is None else sink_logits.float(), sink_logits
        self._flash = flash_version
        self.sealing = recipe.seal == "page"
        self.rows_name: str | None = None
        self.lambda_k: torch.Tensor | None = None  # [kv_heads, dim] float32, where captured graphs read it
        self.unmeasured = False  # what stands there is no lambda yet
        self.kept: Kept | None = None  # where a measured lambda goes
        self._queries: list[torch.Tensor] = []
        self._memory: Any = None
        self._memory_of: tuple[int, ...] = ()
        self.unpacked: tuple[tuple[int, int], Any] | None = (
            None  # the layer's pages beside what flash.py unpacks them to
        )

    def rows_cache(self) -> torch.Tensor:
        """[blocks, kv_heads, 64, 2 dim] of the layer of exact rows."""
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
        if attn_metadata is None or kv_cache.numel() == 0:  # vLLM's profiling run, without a cache
            return output.zero_()
        meta, step, on = attn_metadata, attn_metadata.step, attn_metadata.tensors
        rows_meta = self._metadata_of_rows(meta)
        device, rows = query.device, meta.num_actual_tokens if meta.captured else step.rows
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        pages = format_of(self.recipe, key.dtype, self.num_kv_heads, self.head_size, self.head_size, _backend(device))
        memory = self._memory_for(pages, kv_cache)
        whole, pieces = self._tables(pages, meta, rows_meta)
        work = _workspaces.of(pages, meta, self.num_heads, device, stream)
        how = {"scale": self.scale, "softcap": self.softcap}
        learns = self.unmeasured and not meta.captured
        if step.single and not learns:
            (tables, span), keys = pieces[0], [_rows(x, slice(rows)) for x in (key, value)]
            sealed = on["begin"], on["end"], meta.most_pages
            more = {"sink_logits": self.sinks, "stream": stream, **how}
            pages.step(tables, memory, *keys, *sealed, _rows(query, span), _rows(output, span), work, **more)
            return output
        pages.store(whole, memory, _rows(key, slice(rows)), _rows(value, slice(rows)), work, stream=stream)
        if learns:
            self._keep_queries(query, step)
            if step.most_pages:
                b = int(np.argmax(step.end - step.begin))
                first, last = int(step.begin[b]) // PAGE, int(step.end[b]) // PAGE
                self.measure(rows_meta.table[0][b, first:last].long())
        if meta.most_pages:
            pages.seal(whole, memory, on["begin"], on["end"], meta.most_pages, work, stream=stream)
        for tables, span in pieces:
            q, out = _rows(query, span), _rows(output, span)
            pages.attend(tables, memory, q, out, work, sink_logits=self.sinks, stream=stream, **how)
        for part in meta.parts:
            k, v = self._seen(part, pages, kv_cache, key, value, (meta, rows_meta), work, stream)
            more = {"version": self._flash, "window": self.window, "sinks": self._given_sinks, **how}
            flash.attend(query[part.rows], k, v, output[part.rows], part, **more)
        return output

    def _metadata_of_rows(self, meta: Metadata) -> Metadata:
        if self.rows_name is None:
            return meta
        return get_forward_context().attn_metadata[self.rows_name]

    def _seen(
        self,
        part: flash.Run | flash.Chunk,
        pages: Any,
        kv_cache: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metas: tuple[Metadata, Metadata],
        work: torch.Tensor,
        stream: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what the rows of a part of a step see, [tokens, kv_heads, dim]."""
        if isinstance(part, flash.Run):
            return key[part.rows], value[part.rows]
        packed, held = self._blocks(kv_cache)
        tables = [x.table[0][part.sequence] for x in metas]
        k, v = flash.unpack(part, pages, packed, held, tables, self, workspace=work, stream=stream)
        k[part.computed :], v[part.computed :] = key[part.rows], value[part.rows]
        return k, v

    def _blocks(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Pages [blocks, kv_heads, bytes], none where all rows are exact; exact rows as _halves has them."""
        if self.rows_name is None:
            return None, _halves(kv_cache)
        blocks, heads, tokens, content = kv_cache.shape
        packed = kv_cache.as_strided((blocks, heads, tokens * content), (*kv_cache.stride()[:2], 1))
        return packed, _halves(self.rows_cache())

    def _memory_for(self, pages: Any, kv_cache: torch.Tensor) -> Any:
        """The layer's memory as kv4 takes it; rebuilt only when it has moved."""
        packed, held = self._blocks(kv_cache)
        identity = (kv_cache.data_ptr(), held.data_ptr())
        if self._memory_of != identity:
            self._memory = pages.memory(packed, *held.unbind(2), lambda_k=self.lambda_k)
            self._memory_of = identity
        return self._memory

    def _tables(self, pages: Any, meta: Metadata, rows: Metadata) -> tuple[Any, list[tuple[Any, slice]]]:
        """Two batches: whole sequences, to store and seal, and the pieces to attend to, with their rows. Shared by
        layers of the same blocks."""
        key = (id(meta), id(rows), self.window)
        found = meta.step.kept.get(key)
        if found is None:
            on, step = meta.tensors, meta.step
            sinks = self.recipe.sinks if self.sealing else 0
            limits = {**meta.limits, "window": self.window, "sink_tokens": sinks}

            def tables(queries: torch.Tensor, which: slice, most: int, *arrays: torch.Tensor) -> Any:
                *given, first = (x[which] for x in arrays)
                blocks = first if sinks else None
                return pages.tables(queries, *given, sinks=blocks, most_queries=max(most, 1), **limits)

            sequences = (on["lengths"], on["zeros"], meta.table[0], *rows.table)
            whole = tables(on["queries"], slice(None), step.most_queries, *sequences)
            parts = (on["piece_lengths"], on["piece_sealed"], meta.pieces[0], *rows.pieces)
            pieces = [
                (tables(on[f"span{i}"], span.pieces, span.most_queries, *parts), span.rows)
                for i, span in enumerate(step.spans)
            ]
            if meta.captured:  # the rows of every replay
                pieces = [(pieces[0][0], slice(meta.num_actual_tokens))]
            # The metadata stay alive with what was made of them: their ids name nothing else.
            found = step.kept[key] = (whole, pieces, meta, rows)
        return found[:2]

    def _keep_queries(self, query: torch.Tensor, step: Step) -> None:
        """Keeps queries of longer texts: those of the two-token prompts that a server warms up with are not typical."""
        rows = np.repeat(step.lengths >= LEAST_MEASURED, np.diff(step.queries))
        if rows.any():
            chosen = query[: step.rows][torch.from_numpy(rows).to(query.device)]
            self._queries = [torch.cat([*self._queries, chosen])[-MOST_MEASURED:]]

    def measure(self, blocks: torch.Tensor, missing: int = 0) -> None:
        """Lambda of the queries so far and of keys in blocks of exact rows, int64 [n]; of the last `missing` of them
        there is none yet. Without any query, keys stand for them."""
        keys = _halves(self.rows_cache()).index_select(0, blocks)[:, :, 0]  # [n, kv_heads, 64, dim]
        if missing:
            keys[:, :, PAGE - missing :] = keys[:, :, PAGE - missing - 1, None]
        keys = keys.transpose(0, 1).reshape(1, self.num_kv_heads, -1, self.head_size)
        queries = _rows(self._queries[0], slice(None)) if self._queries else keys
        device = keys.device
        pages = format_of(self.recipe, keys.dtype, self.num_kv_heads, self.head_size, self.head_size, _backend(device))
        found = torch.empty_like(self.lambda_k)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        pages.learn_lambda(queries, keys, found, stream=stream)
        self.lambda_k.copy_(found)
        self.unmeasured, self._queries = False, []
        if self.kept is not None:
            self.kept.save(found.cpu().numpy())


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of exact rows [blocks, kv_heads, 64, 2 dim] as [blocks, kv_heads, 2, 64, dim]: a head's keys, then its
    values, so that kernels copy as many rows of either as they like at once."""
    count, heads, tokens, content = blocks.shape
    dim = content // 2
    return blocks.as_strided((count, heads, 2, tokens, dim), (*blocks.stride()[:2], tokens * dim, dim, 1))


def _rows(x: torch.Tensor, which: slice) -> torch.Tensor:
    """[rows, heads, dim] as [1, heads, those of which, dim], without a copy."""
    return x[which].transpose(0, 1).unsqueeze(0)


def _backend(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
