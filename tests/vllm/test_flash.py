"""Prompts of a step that FlashAttention attends to, on a CPU, with plain attention in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kv4 import Recipe, _core
from kv4.vllm import flash
from kv4.vllm.steps import LONG, PAGE, plan

HEADS, KV_HEADS, DIM = 4, 2, 64
DEVICE = torch.device("cpu")


def plain(**given: Any) -> None:
    """What flash_attn_varlen_func does, in float64: causal from the end, a window of what is newest."""
    q, k, v, out = (given[name] for name in ["q", "k", "v", "out"])
    queries, keys = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        wide = [x[c:d].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), wide[0]) * given["softmax_scale"]
        behind = torch.arange(a - b, 0)[:, None] - torch.arange(c - d, 0)[None]
        hidden = behind < 0
        if given["window_size"][0] >= 0:
            hidden |= behind > given["window_size"][0]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, wide[1]).to(out.dtype)
    assert given["causal"] and max(given["max_seqlen_k"], given["max_seqlen_q"]) >= d - c


class Scene:
    """A sequence in a server's blocks: its rows stored, its full pages sealed."""

    def __init__(self, tokens: int, recipe: Recipe) -> None:
        random = torch.Generator().manual_seed(tokens)
        self.k, self.v = (torch.randn(tokens, KV_HEADS, DIM, generator=random) for _ in "kv")
        self.q = torch.randn(tokens, HEADS, DIM, generator=random)
        self.lambda_k = torch.rand(KV_HEADS, DIM, generator=random) + 0.5
        self.layer = SimpleNamespace(
            num_kv_heads=KV_HEADS, head_size=DIM, recipe=recipe, lambda_k=self.lambda_k, unpacked=None
        )
        self.pages = _core.PageFormat(
            recipe, dtype="float32", kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM, backend="cpu"
        )
        count = -(-tokens // PAGE)
        self.table = torch.randperm(count + 3, generator=random)[:count].int()
        self.rows = torch.full((count + 3, KV_HEADS, 2, PAGE, DIM), torch.nan)
        # A slice's bytes begin on a multiple of 64, as vLLM's blocks do.
        raw = torch.zeros((count + 3) * KV_HEADS * self.pages.head_bytes + 64, dtype=torch.int8)
        raw = raw[-raw.data_ptr() % 64 :][:-64] if raw.data_ptr() % 64 else raw[:-64]
        self.packed = raw[: (count + 3) * KV_HEADS * self.pages.head_bytes].view(count + 3, KV_HEADS, -1)
        self.work = torch.zeros(
            self.pages.workspace_bytes(
                sequences=1, q_heads=HEADS, most_pages=count, most_queries=tokens, longest=tokens, all=tokens
            ),
            dtype=torch.uint8,
        )
        memory = self.memory()
        whole = self.tables(tokens, tokens, 0)
        flat = [x.transpose(0, 1)[None] for x in (self.k, self.v)]
        self.pages.store(whole, memory, *flat, self.work)
        begin, end = (torch.tensor([x], dtype=torch.int32) for x in (0, tokens // PAGE * PAGE))
        self.pages.seal(whole, memory, begin, end, count, self.work)

    def memory(self) -> Any:
        return self.pages.memory(self.packed, *self.rows.unbind(2), lambda_k=self.lambda_k)

    def tables(self, rows: int, length: int, sealed: int) -> Any:
        one = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
        sinks = self.layer.recipe.sinks
        return self.pages.tables(
            one(0, rows),
            one(length),
            one(sealed),
            self.table[None],
            self.table[None],
            sinks=self.table[:1] if sinks else None,
            sink_tokens=sinks,
            most_queries=rows,
        )


def chunk_of(computed: int, count: int) -> flash.Chunk:
    step = plan(np.array([0, count]), np.array([computed + count]), sealing=True, leave=LONG)
    (part,) = flash.parts_of(step, DEVICE)
    assert isinstance(part, flash.Chunk) and not step.spans
    return part


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("computed", [1, 64, 127, 128, 200, 448])
def test_a_chunk_sees_what_a_query_of_pages_would(computed: int, sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "flash_attn_varlen", plain)
    scene = Scene(computed + LONG, Recipe(sinks=sinks))
    chunk = chunk_of(computed, LONG)
    place = {"workspace": scene.work, "stream": 0}
    k, v = flash.unpack(chunk, scene.pages, scene.packed, scene.rows, (scene.table, scene.table), scene.layer, **place)
    assert len(k) == len(v) == chunk.tokens == computed + LONG
    # Exact are the sinks, once page 0 is packed, and what is behind the pages.
    exact = [*range(sinks if chunk.sealed else 0), *range(chunk.sealed, computed)]
    assert (k[exact] == scene.k[exact]).all() and (v[exact] == scene.v[exact]).all()
    assert chunk.sealed == max(computed // PAGE - 1, 0) * PAGE
    k[computed:], v[computed:] = scene.k[computed:], scene.v[computed:]
    got = torch.empty_like(scene.q[computed:])
    how = {"version": 3, "scale": DIM**-0.5, "window": 0, "softcap": 0.0, "sinks": None}
    flash.attend(scene.q[computed:], k, v, got, chunk, **how)
    # kv4's own attention of the same rows, with the same pages. They differ by its 16-bit queries and probabilities.
    want = torch.empty_like(got)
    rows = [x.transpose(0, 1)[None] for x in (scene.q[computed:], want)]
    tables = scene.tables(LONG, computed + LONG, chunk.sealed)
    scene.pages.attend(tables, scene.memory(), *rows, scene.work, scale=DIM**-0.5)
    assert (got - want).abs().max() < 4e-3 * want.abs().max()


def test_adjacent_prompts_that_begin_are_one_run_and_rows_between_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "flash_attn_varlen", plain)
    counts, computed = [3, 70, 1, 2], [0, 0, 40, 0]
    queries = np.concatenate([[0], np.cumsum(counts)])
    step = plan(queries, np.add(counts, computed), sealing=True, leave=LONG)
    parts = flash.parts_of(step, DEVICE)
    assert [(x.rows, x.longest, x.starts.tolist()) for x in parts] == [
        (slice(0, 73), 70, [0, 3, 73]),
        (slice(74, 76), 2, [0, 2]),
    ]
    assert [x.rows for x in step.spans] == [slice(73, 74)]
    random = torch.Generator().manual_seed(1)
    q = torch.randn(76, HEADS, DIM, generator=random)
    k, v = (torch.randn(76, KV_HEADS, DIM, generator=random) for _ in "kv")
    out = torch.full_like(q, 7.0)
    how = {"version": 3, "scale": 0.125, "softcap": 0.0, "sinks": None, "window": 5}
    for part in parts:
        flash.attend(q[part.rows], k[part.rows], v[part.rows], out[part.rows], part, **how)
    assert (out[73] == 7.0).all()
    # A prompt's first row sees itself alone, the others five tokens at most.
    for first in (0, 3, 74):
        assert torch.allclose(out[first], v[first].repeat_interleave(HEADS // KV_HEADS, 0))
    weights = (q[70] * k[66:71].repeat_interleave(2, 1)).sum(-1).mul(0.125).softmax(0)
    assert torch.allclose(out[70], (weights[..., None] * v[66:71].repeat_interleave(2, 1)).sum(0), atol=1e-5)
