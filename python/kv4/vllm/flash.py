"""vLLM's own FlashAttention for the prompts of a step, over rows in the model's dtype.

A prompt that begins in the step sees only rows of the step. For a later chunk the pages before it are unpacked, once
per layer, into rows that the next layer overwrites: attending to packed pages with hundreds of queries would decode
each page many times. All queries of the chunk see as pages what its first query would, and later tokens exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kv4.vllm.steps import LONG, PAGE, Step


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


def chunks_from(model: Any) -> int | None:
    """Rows from which FlashAttention serves a later chunk of a prompt; None: it serves no prompts."""
    return None if version_for(model) is None else LONG


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
    key_starts: torch.Tensor  # int32 [2], of all tokens
    blocks: torch.Tensor  # int32 [1, n]: 0, 1, ...
    kept: dict = field(default_factory=dict)  # what layers of the same blocks share

    @property
    def tokens(self) -> int:
        return self.computed + self.rows.stop - self.rows.start

    @property
    def length(self) -> torch.Tensor:
        return self.key_starts[1:]

    def once(self, name: str, table: torch.Tensor, make: Callable[[], Any]) -> Any:
        """make()'s answer to the first layer with this table of block ids."""
        key = name, table.data_ptr()
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


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
        small = moved(np.array([0, count, 0, 0, 0, length]), device)
        blocks = torch.arange(-(-length // PAGE), dtype=torch.int32, device=device)[None]
        sealed = max((length - count) // PAGE - 1, 0) * PAGE if step.sealing else 0
        found.append(Chunk(int(b), rows, length - count, sealed, *small.split(2), blocks))
    return found


class Unpacked:
    """Rows of one sequence [tokens, kv_heads, dim], keys and values, for the layer at hand."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, tokens: int, heads: int, dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In whole blocks: [blocks, 64, kv_heads, dim]."""
        blocks = -(-tokens // PAGE)
        key = (like.device, like.dtype, heads, dim)
        held = self._held.get(key)
        if held is None or held.shape[1] < blocks:
            size_up = 1 << (blocks - 1).bit_length()
            held = self._held[key] = torch.empty(2, size_up, PAGE, heads, dim, dtype=like.dtype, device=like.device)
        return held[0], held[1]


_unpacked = Unpacked()


def unpack(
    chunk: Chunk, pages: Any, packed: torch.Tensor | None, held: torch.Tensor, tables: Any, layer: Any, **place: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values before the chunk, followed by room for its own rows: [tokens, kv_heads, dim] twice.

    packed: the layer's pages, as PageFormat.memory takes them. held: its exact rows [blocks, kv_heads, 2, 64, dim],
    keys and values. tables: block ids of pages and of exact rows, [entries] int32 each. layer: an Impl. place:
    workspace and stream."""
    heads, dim, sinks = layer.num_kv_heads, layer.head_size, layer.recipe.sinks
    k, v = _unpacked.of(chunk.tokens, heads, dim, held)
    page_table, row_table = tables
    first, last = chunk.sealed // PAGE, -(-chunk.computed // PAGE)
    if first:
        one, end = chunk.once(f"tables, {sinks} sinks", page_table, lambda: _pages_of(chunk, pages, page_table, sinks))
        where = packed.data_ptr(), k.data_ptr()
        if layer.unpacked is None or layer.unpacked[0] != where:
            views = [x.transpose(1, 2) for x in (k, v)]
            layer.unpacked = where, pages.memory(packed, *views, lambda_k=layer.lambda_k)
        memory = layer.unpacked[1]
        pages.dequantise(one, memory, chunk.zeros[:1], end, first, place["workspace"], stream=place["stream"])
    # Whole blocks of exact rows, the sinks' before them; the chunk's own rows overwrite what follows the last one.
    blocks = chunk.once("rows", row_table, lambda: torch.cat([row_table[:1], row_table[first:last]]).long())
    exact = held.index_select(0, blocks)
    for to, half in zip((k, v), exact.unbind(2), strict=True):
        rows = half.transpose(1, 2)
        to[first:last] = rows[1:]
        if first and sinks:
            to[0, :sinks] = rows[0, :sinks]
    return k.flatten(0, 1)[: chunk.tokens], v.flatten(0, 1)[: chunk.tokens]


def _pages_of(chunk: Chunk, pages: Any, table: torch.Tensor, sinks: int) -> tuple[Any, torch.Tensor]:
    """The chunk's sequence as one of kv4's tables whose exact rows are what is unpacked, and the end of its pages."""
    one = pages.tables(
        chunk.zeros,
        chunk.length,
        chunk.zeros[:1],
        table[None],
        chunk.blocks,
        sinks=chunk.zeros[:1] if sinks else None,
        sink_tokens=sinks,
        most_queries=1,
        longest=chunk.tokens,
        all=chunk.tokens,
    )
    return one, chunk.blocks.new_full((1,), chunk.sealed)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, part: Run | Chunk, **how: Any) -> None:
    """Causal attention of the part's rows: q and out [rows, heads, dim]; k and v [tokens, kv_heads, dim], of a chunk
    all that it sees, else the rows' own. how: version, scale, window (0: all), softcap, sinks [heads] or None."""
    if isinstance(part, Run):
        starts, longest, keys = part.starts, part.longest, part.longest
        key_starts = starts
    else:
        starts, longest, keys = part.starts, len(q), len(k)
        key_starts = part.key_starts
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
