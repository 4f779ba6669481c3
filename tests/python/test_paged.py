"""kv4._core.PageFormat: a host's memory, against plain attention."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kv4 import Recipe, _core

PAGE = 64
HEADS, KV_HEADS, DIM = 4, 2, 64
TOKENS = [1, 63, 64, 65, 200]


class Host:
    """Pools, tables and rows of some sequences; page i and block i of a sequence have ids that differ."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32, recipe: Recipe | None = None) -> None:
        draw = torch.Generator().manual_seed(5)
        self.lengths, self.dtype = lengths, dtype
        self.format = _core.PageFormat(
            recipe or Recipe(), dtype=str(dtype)[6:], kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM
        )
        n, entries = len(lengths), max(lengths) // PAGE + 1
        self.page_table = torch.randperm(n * entries, generator=draw).to(torch.int32).view(n, entries)
        self.block_table = torch.randperm(n * entries, generator=draw).to(torch.int32).view(n, entries)
        self.pages = torch.zeros(n * entries, KV_HEADS, self.format.head_bytes, dtype=torch.uint8)
        held = torch.zeros(n * entries, KV_HEADS, PAGE, 2 * DIM, dtype=dtype)
        self.k, self.v = held[..., :DIM], held[..., DIM:]
        rows = sum(lengths)
        self.q = torch.randn(1, HEADS, rows, DIM, generator=draw).to(dtype)
        self.new_k = torch.randn(1, KV_HEADS, rows, DIM, generator=draw).to(dtype)
        self.new_v = torch.randn(1, KV_HEADS, rows, DIM, generator=draw).to(dtype)
        size = self.format.workspace_bytes(
            sequences=n, q_heads=HEADS, most_pages=entries, most_queries=max(lengths), longest=max(lengths), all=rows
        )
        self.workspace = torch.empty(size, dtype=torch.uint8)
        self.format.prepare(self.workspace)
        self.memory = self.format.memory(self.pages, self.k, self.v)

    def tables(self, sealed: list[int], **more: object) -> object:
        queries = torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32)
        lengths, done = torch.tensor(self.lengths, dtype=torch.int32), torch.tensor(sealed, dtype=torch.int32)
        return self.format.tables(queries, lengths, done, self.page_table, self.block_table, **more)

    def fill(self) -> None:
        self.format.store(self.tables([0] * len(self.lengths)), self.memory, self.new_k, self.new_v, self.workspace)

    def seal(self) -> list[int]:
        """All full pages; with the first four tokens as sinks."""
        n = len(self.lengths)
        full = [length // PAGE * PAGE for length in self.lengths]
        end = torch.tensor(full, dtype=torch.int32)
        tables = self.tables([0] * n, sinks=self.block_table[:, 0].contiguous(), sink_tokens=4)
        self.format.seal(tables, self.memory, torch.zeros_like(end), end, max(full) // PAGE, self.workspace)
        return full

    def attend(self, tables: object, **more: object) -> torch.Tensor:
        out = torch.empty(1, HEADS, self.q.shape[2], DIM, dtype=self.dtype)
        self.format.attend(tables, self.memory, self.q, out, self.workspace, **more)
        return out

    def plain(self, k: torch.Tensor, v: torch.Tensor, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
        """In float64, sequence by sequence."""
        outs, at = [], 0
        for length in self.lengths:
            own = slice(at, at + length)
            at += length
            spread = [x[0, :, own].double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v)]
            scores = self.q[0, :, own].double() @ spread[0].transpose(1, 2) * DIM**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            behind = torch.arange(length)[:, None] - torch.arange(length)[None]
            seen = (behind >= 0) & (behind < window if window else True)
            outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ spread[1])
        return torch.cat(outs, 1)[None]

    def dequantised(self, full: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the rows' order as readers of the pages see them: sinks and tails are what was stored."""
        k, v, at = self.new_k.clone(), self.new_v.clone(), 0
        rows_k, rows_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        memory = self.format.memory(self.pages, rows_k, rows_v)
        end = torch.tensor(full, dtype=torch.int32)
        self.format.dequantise(
            self.tables([0] * len(full)), memory, torch.zeros_like(end), end, max(full) // PAGE, self.workspace
        )
        for b, length in enumerate(self.lengths):
            for position in range(4, full[b]):
                block = int(self.block_table[b, position // PAGE])
                k[0, :, at + position] = rows_k[block, :, position % PAGE]
                v[0, :, at + position] = rows_v[block, :, position % PAGE]
            at += length
        return k, v


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 50])
def test_rows_of_many_sequences_are_attended_to_in_one_call(window: int, softcap: float) -> None:
    host = Host(TOKENS)
    host.fill()
    got = host.attend(host.tables([0] * len(TOKENS), window=window), softcap=softcap)
    expected = host.plain(host.new_k, host.new_v, window, softcap)
    assert (got - expected).abs().max() < 1e-5  # float32 sums of 200 terms of order 1


@pytest.mark.parametrize(("bits", "refined"), [((4, 4), 0), ((4, 4), 1), ((6, 3), 2), ((3, 2), 0), ((8, 8), 0)])
def test_what_is_sealed_is_read_from_pages_and_sinks_from_their_blocks(bits: tuple[int, int], refined: int) -> None:
    host = Host(TOKENS, recipe=dataclasses.replace(Recipe().with_bits(*bits), refined=refined))
    host.fill()
    full = host.seal()
    k, v = host.dequantised(full)
    # Gaussian rows: what Lloyd's and Max's levels leave of the variance (Max 1960, table I), some more with few
    # channels; what is not sealed adds nothing.
    left = {2: 0.1175, 3: 0.0345, 4: 0.0095, 6: 0.0010, 8: 0.0001}
    assert 0 < (k - host.new_k).square().mean() < 2 * left[bits[0]]
    assert 0 < (v - host.new_v).square().mean() < 2 * left[bits[1]]
    tables = host.tables(full, sinks=host.block_table[:, 0].contiguous(), sink_tokens=4)
    got, expected = host.attend(tables), host.plain(k, v)
    # Pages are read with queries and probabilities in 8 bits, twice as fine by far as what 4 bits cost.
    assert (got - expected).norm() < (expected - host.plain(host.new_k, host.new_v)).norm() / 2
    # Blocks whose pages are sealed are the host's again.
    for b, done in enumerate(full):
        for i in range(1, done // PAGE):
            host.k[int(host.block_table[b, i])] = torch.nan
    torch.testing.assert_close(host.attend(tables), got, rtol=0, atol=0)


def test_a_partial_state_is_the_attention_before_it_is_normalised() -> None:
    host = Host(TOKENS)
    host.fill()
    rows = host.q.shape[2]
    o, m, total = torch.empty(1, HEADS, rows, DIM), torch.empty(1, HEADS, rows), torch.empty(1, HEADS, rows)
    tables = host.tables([0] * len(TOKENS))
    host.format.attend_partial(tables, host.memory, host.q, o, m, total, host.workspace)
    torch.testing.assert_close(o / total[..., None], host.attend(tables), rtol=1e-5, atol=1e-5)


def test_lambda_has_geometric_mean_one_and_serves_a_layer() -> None:
    host = Host([128])
    host.fill()
    found = torch.empty(KV_HEADS, DIM)
    scaled = host.q * torch.linspace(0.2, 5, DIM)
    host.format.learn_lambda(scaled, host.new_k, found)
    torch.testing.assert_close(found.log().mean(1), torch.zeros(KV_HEADS), rtol=0, atol=1e-4)
    assert (found[:, -1] > found[:, 0]).all()
    host.memory = host.format.memory(host.pages, host.k, host.v, lambda_k=found)
    full = host.seal()
    with_lambda = host.pages.clone()
    host.memory = host.format.memory(host.pages, host.k, host.v)
    host.seal()
    assert full == [128] and not torch.equal(with_lambda, host.pages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [1, 2]}, r"queries: expected 3 values; got shape \[3\]|lengths"),
        ({"table": torch.int64}, "pages: expected dtype int32; got int64"),
        ({"pages": torch.float32}, "pages: expected dtype uint8; got float32"),
        ({"k": torch.float16}, "k: expected dtype float32; got float16"),
        ({"head_dim": 32}, r"k: expected shape \[blocks, 2, 64, 64\]"),
        ({"workspace": torch.int32}, "workspace: expected dtype uint8; got int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    host = Host([10, 20])
    i32 = torch.int32
    queries, lengths = torch.tensor([0, 10, 30], dtype=i32), torch.tensor(change.get("lengths", [10, 20]), dtype=i32)
    if "lengths" in change:
        lengths, message = lengths[:1], r"queries: expected 2 values; got shape \[3\]"
    with pytest.raises(ValueError, match=message):
        table = host.page_table.to(change.get("table", i32))
        tables = host.format.tables(queries, lengths, torch.zeros_like(lengths), table, host.block_table)
        k = host.k[..., : change.get("head_dim", DIM)].to(change.get("k", torch.float32))
        memory = host.format.memory(host.pages.to(change.get("pages", torch.uint8)), k, host.v)
        workspace = host.workspace.to(change.get("workspace", torch.uint8))
        host.format.store(tables, memory, host.new_k, host.new_v, workspace)


def test_a_table_that_leads_out_of_memory_is_refused_and_nothing_is_written() -> None:
    host = Host([10, 70])
    host.block_table[1, 1] = 99
    with pytest.raises(IndexError, match=r"blocks\[1, 1\]: expected an id from 0 to 3; got 99"):
        host.fill()
    assert not host.k.any()


def test_a_format_of_another_seal_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="recipe.seal: expected page"):
        Host([1], recipe=Recipe.exact())


def test_tables_keep_their_tensors_alive() -> None:
    host = Host([64, 65])
    host.fill()
    tables = host.tables([0, 0])
    expected = host.attend(tables)
    for _ in range(100):  # would reuse the memory of tensors that nobody holds
        torch.full((3,), -1, dtype=torch.int32)
    torch.testing.assert_close(host.attend(tables), expected, rtol=0, atol=0)
