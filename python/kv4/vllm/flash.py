"""vLLM's own FlashAttention for the prompts of a step, over rows in the model's dtype.

A prompt that begins in the step sees only rows of the step. For a later chunk the pages before it are unpacked, once
per layer, into rows that the next layer overwrites: attending to packed pages with hundreds of queries would decode
each page many times. All queries of the chunk see as pages what its first query would, and later tokens exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kv4.vllm.steps import PAGE, Step


def moved(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """int32, on the device, without a wait."""
    found = torch.from_numpy(np.ascontiguousarray(x, np.int32))
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def version_for(model: Any) -> int | None:
    """Which FlashAttention serves a model's layers here; None: none does. Version 2 knows no sinks."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    size = model.get_head_size()
    version = get_flash_attn_version(head_size=size) if size <= 256 else None
    return version if version is not None and version > 2 else None


@dataclass
class Run:
    """Adjacent prompts that begin in the step."""

    rows: slice
    longest: int
    starts: torch.Tensor  # int32 [n + 1], from 0


@dataclass
class Chunk:
    """A later chunk of a prompt."""

    sequence: int
    rows: slice
    computed: int  # tokens before it
    sealed: int  # of them, that it reads from pages
    starts: torch.Tensor  # int32 [2], of its rows
    zeros: torch.Tensor  # int32 [2]
    length: torch.Tensor  # int32 [1]
    blocks: torch.Tensor  # int32 [1, n]: 0, 1, ...

    @property
    def tokens(self) -> int:
        return self.computed + self.rows.stop - self.rows.start


def parts_of(step: Step, device: torch.device) -> list[Run | Chunk]:
    """The parts of a step that FlashAttention attends to."""
    counts = np.diff(step.queries)
    fresh = step.left & (counts == step.lengths)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], fresh.astype(np.int8), [0]])))
    found: list[Run | Chunk] = []
    for first, last in edges.reshape(-1, 2):
        starts = step.queries[first : last + 1]
        rows = slice(int(starts[0]), int(starts[-1]))
        found.append(Run(rows, int(counts[first:last].max()), moved(starts - starts[0], device)))
    for b in np.flatnonzero(step.left & ~fresh):
        count, length = int(counts[b]), int(step.lengths[b])
        rows = slice(int(step.queries[b]), int(step.queries[b + 1]))
        small = moved(np.array([0, count, 0, 0, length]), device)
        blocks = torch.arange(-(-length // PAGE), dtype=torch.int32, device=device)[None]
        sealed = max((length - count) // PAGE - 1, 0) * PAGE if step.sealing else 0
        found.append(Chunk(int(b), rows, length - count, sealed, small[:2], small[2:4], small[4:], blocks))
    return found


class Unpacked:
    """Rows of one sequence [tokens, kv_heads, dim], keys and values, for the layer at hand."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, tokens: int, heads: int, dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole blocks of them."""
        size = -(-tokens // PAGE) * PAGE
        key = (like.device, like.dtype, heads, dim)
        held = self._held.get(key)
        if held is None or held.shape[1] < size:
            size_up = 1 << (size - 1).bit_length()
            held = self._held[key] = torch.empty(2, size_up, heads, dim, dtype=like.dtype, device=like.device)
        return held[0, :size], held[1, :size]


_unpacked = Unpacked()


def unpack(
    chunk: Chunk, pages: Any, packed: torch.Tensor | None, held: torch.Tensor, tables: Any, layer: Any, **place: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values before the chunk, followed by room for its own rows: [tokens, kv_heads, dim] twice.

    packed: the layer's pages, as PageFormat.memory takes them. held: its exact rows [blocks, kv_heads, 64, keys then
    values]. tables: block ids of pages and of exact rows, [entries] int32 each. layer: kv_heads, dim, sinks, lambda_k.
    place: workspace, stream."""
    heads, dim = layer.num_kv_heads, layer.head_size
    k, v = _unpacked.of(chunk.tokens, heads, dim, held)
    page_table, row_table = tables
    first = chunk.sealed // PAGE
    if first:
        views = [x.view(-1, PAGE, heads, dim).transpose(1, 2) for x in (k, v)]
        memory = pages.memory(packed, *views, lambda_k=layer.lambda_k)
        sinks = layer.recipe.sinks
        one = pages.tables(
            chunk.zeros,
            chunk.length,
            chunk.zeros[:1],
            page_table[None],
            chunk.blocks,
            sinks=chunk.zeros[:1] if sinks else None,
            sink_tokens=sinks,
            most_queries=1,
            longest=chunk.tokens,
            all=chunk.tokens,
        )
        end = chunk.blocks.new_full((1,), chunk.sealed)
        pages.dequantise(one, memory, chunk.zeros[:1], end, first, place["workspace"], stream=place["stream"])
        if sinks:
            k[:sinks], v[:sinks] = _rows_of(held, row_table[:1], dim, sinks)
    last = -(-chunk.computed // PAGE)
    exact = slice(chunk.sealed, chunk.computed)
    count = exact.stop - exact.start
    if count:
        k[exact], v[exact] = _rows_of(held, row_table[first:last], dim, count)
    return k[: chunk.tokens], v[: chunk.tokens]


def _rows_of(held: torch.Tensor, blocks: torch.Tensor, dim: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` rows of blocks, as [count, kv_heads, dim] of keys and of values."""
    rows = held.index_select(0, blocks.long()).transpose(1, 2).flatten(0, 1)[:count]
    return rows[..., :dim], rows[..., dim:]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, part: Run | Chunk, **how: Any) -> None:
    """Causal attention of the part's rows: q and out [rows, heads, dim]; k and v [tokens, kv_heads, dim], of a chunk
    all that it sees, else the rows' own. how: version, scale, window (0: all), softcap, sinks [heads] or None."""
    if isinstance(part, Run):
        starts, longest, keys = part.starts, part.longest, part.longest
        key_starts = starts
    else:
        starts, longest, keys = part.starts, len(q), len(k)
        key_starts = torch.cat([part.zeros[:1], part.length])
    flash_attn_varlen(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=starts,
        cu_seqlens_k=key_starts,
        max_seqlen_q=longest,
        max_seqlen_k=keys,
        softmax_scale=how["scale"],
        causal=True,
        window_size=[how["window"] - 1, 0] if how["window"] else [-1, -1],
        softcap=how["softcap"],
        s_aux=how["sinks"],
        fa_version=how["version"],
    )


def flash_attn_varlen(**given: Any) -> None:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    flash_attn_varlen_func(**given)
