"""Sequences of kv4.metal's caches: pages filled on arrival, forks, failures, lengths of their own in one call."""

from __future__ import annotations

import pytest
import torch

import kv4.metal.sealing
from kv4 import Recipe
from kv4.metal.mps import TorchHost
from metal_cases import GROUP, HEADS, RECIPES, Pair
from metal_device import needs_emulator


@needs_emulator
@pytest.mark.parametrize("tokens", [1, 40, 64, 100])
def test_who_shares_a_page_that_is_filled_on_arrival_fills_a_copy(tokens):
    pair = Pair(Recipe.paper(), batch=2, seed=6)  # 5 has a value on a decision boundary, which may go either way
    pair.step(100)
    twins = pair.metal.clone(), pair.core.clone()
    used = pair.metal.pool.count - len(pair.metal.pool.free)
    pair.step(tokens)
    more = (100 + tokens + 63) // 64 - 2  # pages of each sequence
    assert pair.metal.pool.count - len(pair.metal.pool.free) == used + 2 * (more + 1), "a copy each, and new ones"
    first = pair.metal, pair.core
    pair.metal, pair.core = twins
    pair.compare()
    pair.both("crop", 30)  # back in a page that the others hold whole
    pair.step(tokens)
    pair.step(3)
    pair.metal, pair.core = first
    pair.compare()
    used = pair.metal.pool.count - len(pair.metal.pool.free)
    pair.step(1)
    pair.both("select", [1, 0])
    pair.step(1)
    grown = 2 * ((102 + tokens + 63) // 64 - (100 + tokens + 63) // 64)
    assert pair.metal.pool.count - len(pair.metal.pool.free) == used + grown, "alone again: nothing is copied"


@needs_emulator
@pytest.mark.parametrize("name", ["default", "paper"])
def test_an_append_that_a_device_cannot_seal_leaves_every_sequence(name, monkeypatch):
    pair = Pair(RECIPES[name], batch=2, seed=6)
    pair.step(200)
    twins = pair.metal.clone(), pair.core.clone()
    k, v = pair.normal(HEADS, 90), pair.normal(HEADS, 90)
    used = pair.metal.pool.count - len(pair.metal.pool.free)

    def fails(*arguments):
        raise MemoryError("no memory")

    monkeypatch.setattr(kv4.metal.sealing, "seal", fails)
    with pytest.raises(MemoryError):
        pair.metal.append(k, v)
    monkeypatch.undo()
    assert pair.metal.pool.count - len(pair.metal.pool.free) == used
    pair.compare()
    pair.step(90)
    pair.metal, pair.core = twins
    pair.compare()
    pair.step(2)


@needs_emulator
@pytest.mark.parametrize("name", ["default", "exact", "paper"])
def test_sequences_of_their_own_lengths_are_what_each_is_alone(name, monkeypatch):
    """Appended together by their rows of one array, attended to in one launch, cropped and joined."""
    pair = Pair(RECIPES[name], batch=3)
    together, alone = pair.metal, [Pair(RECIPES[name]).metal for _ in range(3)]
    launches = []
    run = TorchHost.run
    monkeypatch.setattr(TorchHost, "run", lambda self, kernel, *x: launches.append(kernel) or run(self, kernel, *x))
    for spans in (
        [(0, 40), (0, 200), (60, 130)],
        [(0, 1), (0, 1), (0, 1)],
        [(0, 0), (2, 9), (0, 64)],
        [(0, 70), (69, 70), (0, 0)],
        [(0, 1), (0, 1), (0, 1)],
    ):
        tokens = max(hi for _, hi in spans)
        k, v, q = pair.normal(HEADS, tokens), pair.normal(HEADS, tokens), pair.normal(HEADS * GROUP, tokens)
        together.append(k, v, spans)
        launches.clear()
        ours = together.attended(q, spans=spans)
        assert sum("attend" in kernel for kernel in launches) == 1
        for b, (cache, (lo, hi)) in enumerate(zip(alone, spans, strict=True)):
            assert not ours[b, :, :lo].any() and not ours[b, :, hi:].any()
            if hi == lo:
                continue
            cache.append(k[b : b + 1, :, lo:hi], v[b : b + 1, :, lo:hi])
            theirs = cache.attended(q[b : b + 1, :, lo:hi])
            assert (ours[b : b + 1, :, lo:hi] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert together.lengths == [cache.length for cache in alone]
    lengths = [n - drop for n, drop in zip(together.lengths, (0, 100, 7), strict=True)]
    for row, (cache, n) in enumerate(zip(alone, lengths, strict=True)):
        together.crop(n, row)
        cache.crop(n)
    joined = alone[0].clone()
    for cache in alone[1:]:
        joined.extend(cache)
    q = pair.normal(HEADS * GROUP, 1)
    k, v = pair.normal(HEADS, 1), pair.normal(HEADS, 1)
    outs = []
    for cache in (together, joined):
        cache.append(k, v)
        outs.append(cache.attended(q))
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[0].abs().max()
    for b in range(3):
        assert together.page_count(b) == joined.page_count(b)
        for page in range(together.page_count(b)):
            for head in range(HEADS):
                assert together.page_codes(b, page, head) == joined.page_codes(b, page, head)
    for spans, match in (([(0, 1)] * 2, "3 ranges within 0 to 1"), ([(0, 2)] * 3, "3 ranges"), ([(0, 0)] * 3, "a row")):
        with pytest.raises(ValueError, match=f"^spans: expected {match}"):
            together.attended(q, spans=spans)


@needs_emulator
def test_lambda_that_no_query_taught_stays():
    """Queries that do not see their own token teach nothing: a crop that undoes the page leaves what was learnt of its
    keys, since nothing could teach it anew."""
    pair = Pair(Recipe())
    for tokens in (120, 60):
        length = pair.core.length + tokens
        mask = torch.ones((1, 1, tokens, length), dtype=torch.bool).tril(length - tokens - 1)
        pair.step(tokens, mask=mask)
    kept = pair.core.lambda_(0)
    assert kept and pair.core.page_count(0) == 1
    pair.both("crop", 100)
    assert pair.core.page_count(0) == 0
    pair.step(150)
    pair.step(1)
    assert pair.core.lambda_(0) == kept
