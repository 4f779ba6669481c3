"""Saves and loads a Cache in the file format of kv4._core.Cache; each reads the other's files."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv4.messages import mismatch

from .sealing import Sealing
from .sequence import Energies, Sequence


def save(cache: Sealing, write: Any) -> None:
    """Passes the cache to write(memoryview). Waits for the device, and has a copy of the layer on the CPU meanwhile."""
    host, sinks = cache.host, cache.sink_limit
    held = [host.bits(x) for x in cache.rows]
    sequences = []
    for b, s in enumerate(cache.sequences):
        x = s.extent
        exact = [np.ascontiguousarray(side[b, :, : x.sinks]) for side in held]
        exact += [np.ascontiguousarray(side[b, :, sinks : sinks + x.window_rows]) for side in held]
        recorded = [
            (position, row)
            for positions, rows in s.energies.parts
            for position, row in zip(positions, np.ascontiguousarray(host.numpy(rows)), strict=True)
        ]
        lambda_ = None if s.lambda_ is None else np.ascontiguousarray(host.numpy(s.lambda_))
        sequences.append((s.ledger, lambda_, s.energies.first, recorded, exact))
    ids = sorted({id_ for s in cache.sequences for id_ in s.ledger.pages})
    pages = host.numpy(host.take(cache.pool.slab, ids, 0)) if ids else np.empty(0, np.uint8)
    cache.format.write(write, cache.recording, sequences, ids, pages)


def load(cache: Sealing, readinto: Any) -> None:
    """Takes what was saved from readinto(memoryview). Errors: those of kv4._core.Cache.load; the cache then is empty as
    before."""
    if cache.sequences:
        got = f"{len(cache.sequences)} sequences"
        raise RuntimeError(mismatch("cache", "an empty cache (reset empties it)", got))
    host, sinks = cache.host, cache.sink_limit
    recording, contents, pages = cache.format.read(readinto)
    taken = cache.pool.take(len(pages))
    if taken:
        cache.pool.slab = host.put(cache.pool.slab, [page.place for page in taken], host.table(pages))
    room = sinks + cache.room(max((ledger.extent.window_rows for ledger, *_ in contents), default=0))
    row_bytes = np.dtype(np.uint16 if cache.dtype != "float32" else np.float32).itemsize * cache.dim
    held = [np.zeros((len(contents), cache.heads, room, row_bytes), np.uint8) for _ in range(2)]
    sequences = []
    for b, (ledger, lambda_, first, recorded, exact) in enumerate(contents):
        for i, part in enumerate(exact):
            begin = 0 if i < 2 else sinks
            held[i % 2][b, :, begin : begin + part.shape[1]] = part
        own = [taken[number] for number in ledger.pages]
        parts = []
        if recorded:
            positions, rows = zip(*recorded, strict=True)
            parts = [(list(positions), host.table(np.stack(rows)))]
        s = Sequence(
            ledger.moved([page.place for page in own]),
            {page.place: page for page in own},
            Energies(first, parts),
            None if lambda_ is None else host.table(lambda_),
        )
        s.alone = s.page_end
        sequences.append(s)
    if not room:  # all is sealed as it arrives
        cache.rows = [host.zeros((len(sequences), cache.heads, 0, cache.dim), cache.dtype) for _ in range(2)]
    else:
        cache.rows = [host.of_bits(x, cache.dtype) for x in held] if sequences else []
    cache.sequences, cache.recording = sequences, recording
