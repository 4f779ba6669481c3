"""The calls of the C++ core's Cache, its arrays on a Metal device.

Policy (what is sealed, dropped and visible when) is in the library's ledger (kv4._core.Ledger), one per sequence;
arithmetic is in the kernels. This module has the arrays and launches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from kv4 import _core
from kv4._core import PAGE_TOKENS as PAGE
from kv4.messages import mismatch
from kv4.recipe import Recipe

from . import saved
from .host import DTYPES, Host, shared_constants
from .launch import attend
from .sealing import Sealing
from .sequence import Energies, Made, Pages, Sequence, Span


class Cache(Sealing):
    """One layer's cache of sequences, each of its own length; the arguments are those of kv4._core.Cache, and the host
    of its arrays and kernels. `spans` of a call: each sequence's rows [first, last) of its arrays; all by default.

    NaN and infinity are held as zeros; no error is raised for them.
    Errors: NotImplementedError with the reason where no Metal kernel serves the recipe or the head dims; ValueError,
    IndexError and RuntimeError as the core's. A failed call leaves the cache as it was.
    """

    def __init__(
        self,
        host: Host,
        recipe: Recipe,
        *,
        dtype: str,
        kv_heads: int,
        head_dim_k: int,
        head_dim_v: int,
        sliding_window: int = 0,
        lambda_k: Any = None,
        lambda_v: Any = None,
        matrix_k: Any = None,
        matrix_v: Any = None,
    ) -> None:
        shape = {"dtype": dtype, "kv_heads": kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v}
        matrices = {"matrix_k": matrix_k, "matrix_v": matrix_v}
        # The core's own checks of every argument.
        given = {"sliding_window": sliding_window, "lambda_k": lambda_k, "lambda_v": lambda_v}
        core = _core.Cache(recipe, **shape, **matrices, **given)
        self.constants = shared_constants(host, recipe, **shape, **matrices)
        self.format = _core.SavedFormat(core, self.constants.tables)
        self.host = host
        self.recipe = recipe
        self.dtype = dtype
        self.heads, self.dim, self.window = kv_heads, head_dim_k, sliding_window
        self.given_k, self.given_v = (
            None if x is None else host.table(np.asarray(x, np.float32)) for x in (lambda_k, lambda_v)
        )
        self.seals = recipe.seal == "page"  # whole pages, from exact rows
        self.sink_limit = recipe.sinks if self.seals else 0
        self.pool = Pages(host, self.constants.tables.page_bytes)
        self.recording = False
        self._forget()

    def _empty(self) -> Sequence:
        return Sequence.empty(self.recipe, self.window)

    def _forget(self) -> None:
        self.sequences: list[Sequence] = []
        self.rows: list[Any] = []

    # Appending.

    def append(self, k: Any, v: Any, spans: Rows[Span] | None = None) -> None:
        """k, v [batch, kv_heads, T, head_dim], T may be 0. The first call fixes the batch."""
        for name, x in (("k", k), ("v", v)):
            elsewhere = self.host.why_not_here(x)
            if elsewhere is not None:
                raise ValueError(mismatch(name, "an array on the cache's device", elsewhere))
            if self.host.dtype(x) != self.dtype:
                raise ValueError(mismatch(name, f"dtype {self.dtype}", self.host.dtype(x)))
            batch = len(self.sequences) or max([1, *x.shape[:1]])
            if len(x.shape) != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, self.heads, self.dim):
                expected = f"shape [{batch}, {self.heads}, tokens, {self.dim}]"
                raise ValueError(mismatch(name, expected, list(x.shape)))
        if tuple(k.shape) != tuple(v.shape):
            raise ValueError(mismatch("v", f"the batch and tokens of k, {list(k.shape)}", list(v.shape)))
        spans = _spans(spans, k.shape[0], k.shape[2])
        stored = [self.host.finite(x) for x in (k, v)]
        sequences = self.sequences or [self._empty() for _ in range(k.shape[0])]
        plans = [s.ledger.append(hi - lo, self.recording) for s, (lo, hi) in zip(sequences, spans, strict=True)]
        self.carry_out(sequences, plans, stored, spans)
        self.sequences = sequences

    def seal(self) -> None:
        """Seals what is due and releases the exact rows that were kept for a crop of the last call."""
        if self.sequences:
            self.carry_out(self.sequences, [s.ledger.settle(self.recording) for s in self.sequences])

    # Attention.

    def attended(
        self,
        q: Any,
        *,
        rows: Rows[int] | None = None,
        spans: Rows[Span] | None = None,
        upto: int | Rows[int] | None = None,
        out: Any = None,
        dtype: str = "float32",
        scale: float = 0.0,
        softcap: float = 0.0,
        sinks: Any = None,
        causal: bool = True,
        offset: int = 0,
        start: Any = None,
        window: Any = None,
        mask: Any = None,
    ) -> Any:
        """Attention of q [batch, q_heads, T, head_dim], the newest T positions; the options are the core's. Returns
        [batch, q_heads, T, head_dim] in `dtype`, or `out`, which kernels that write in place fill; or with upto (one
        for all, or one each) the partial states over positions below it: float32 [batch, q_heads, T, head_dim + 2],
        o, m and l side by side. rows: the sequence of each of q's; all by default. Rows of q outside of `spans` are
        answered with 0, `out` there is as it was."""
        if not self.sequences:
            raise RuntimeError(mismatch("q", "a cache that holds tokens", "an empty cache"))
        rows = list(range(len(self.sequences)) if rows is None else rows)
        self._check_call(q, len(rows), dtype, sinks, mask)
        _core.check_attention(scale, softcap, offset, start is not None, None if mask is None else mask.shape[3])
        tokens, lengths = q.shape[2], [self._sequence(row).extent.length for row in rows]
        spans = _spans(spans, len(rows), tokens)
        below = lengths if upto is None else [upto] * len(rows) if isinstance(upto, int) else list(upto)
        for row, length, (lo, hi), value in zip(rows, lengths, spans, below, strict=True):
            if hi - lo > length:
                raise ValueError(mismatch("q", f"shape with at most {length} tokens, those of sequence {row}", hi - lo))
            if not 0 <= value <= length:
                raise IndexError(mismatch("upto", f"0 to {length}", value))
        if not any(hi > lo for lo, hi in spans):
            raise ValueError(mismatch("spans", "a row of some sequence", spans))
        seen = self._seen(rows, tokens, spans, causal, offset, start, window, mask)
        plans, energies = [None] * len(self.sequences), [s.energies for s in self.sequences]
        for row, x in zip(rows, seen, strict=True):
            if x.queries:
                plans[row] = self.sequences[row].ledger.attend(x)
                energies[row] = self._with_energies(q, self.sequences[row], x)
        made = self._made(self.sequences, plans, energies)
        held = self.rows
        if any(plan is not None and plan.new_pages for plan in plans):
            self.rows = self._moved(self.sequences, plans, anew=True)
        try:
            nexts = [self._next(*x) for x in zip(self.sequences, plans, energies, made, strict=True)]
            table, lambda_rows = self.lambda_table([s.lambda_ for s in nexts])
            asked = zip(rows, seen, below, strict=True)
            done = attend(
                self,
                q,
                [(nexts[row].ledger, x, end, lambda_rows[row], row) for row, x, end in asked if x.queries],
                lambda_k=table,
                out=out,
                dtype=None if upto is not None else dtype,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                causal=causal,
                mask=mask,
                offset=offset,
            )
        except BaseException:
            self.rows = held
            raise
        for s, plan, new in zip(nexts, plans, made, strict=True):
            if plan is not None and not plan.new_pages:
                s.commit(plan, new)
        self.sequences = nexts
        if out is None and any(span != (0, tokens) for span in spans):
            asked = np.array([[lo <= t < hi for t in range(tokens)] for lo, hi in spans])
            done = self.host.where(asked[:, None, :, None], done, 0)
        return done

    def _seen(
        self,
        rows: list[int],
        tokens: int,
        spans: list[Span],
        causal: bool,
        offset: int,
        start: Any,
        window: Any,
        mask: Any,
    ) -> list[_core.Sight]:
        batch = len(rows)
        limits = [self.window if causal else 0] * batch if window is None else _integers("window", window, batch)
        starts = [None] * batch if start is None else _integers("start", start, batch)
        general = None
        if mask is not None:
            general = self.host.seen(mask)
            general = np.ascontiguousarray(np.broadcast_to(general, (batch, tokens, general.shape[-1])))
        found = []
        for i, row in enumerate(rows):
            own = None if general is None else general[i]
            length = self.sequences[row].extent.length
            found.append(_core.Sight(length, i, spans[i], causal, starts[i], limits[i], own, offset))
        return found

    @staticmethod
    def _next(s: Sequence, plan: Any, energies: Energies, made: Made) -> Sequence:
        """The sequence that the call reads, committed already if the call seals pages."""
        after = s.fork() if made.pages else dataclasses.replace(s)
        after.energies, after.lambda_ = energies, made.lambda_
        if made.pages:
            after.commit(plan, made)
        return after

    def _with_energies(self, q: Any, s: Sequence, seen: _core.Sight) -> Energies:
        """The energies held of the first queries that see themselves, the call's included."""
        energies = s.energies
        first, positions = s.ledger.record(energies.first, seen)
        if not positions:
            return energies if first == energies.first else dataclasses.replace(energies, first=first)
        # A call may be repeated, with another mask: its queries' rows are the new ones.
        kept = energies.before(self.host, seen.first_query).parts if energies.first < seen.first_query else []
        rows = self.host.energies(q, seen.input, [seen.row + x - seen.first_query for x in positions], self.heads)
        return Energies(first, [*kept, (positions, rows)])

    def _check_call(self, q: Any, batch: int, dtype: str, sinks: Any, mask: Any) -> None:
        """Checks a call before anything of it is recorded."""
        host = self.host
        fits = len(q.shape) == 4 and q.shape[0] == batch and q.shape[1] >= self.heads and q.shape[1] % self.heads == 0
        fits = fits and q.shape[3] == self.dim and q.shape[2] >= 1 and host.strides(q)[-1] == 1
        if not fits:
            expected = f"shape [{batch}, a multiple of {self.heads}, 1 or more, {self.dim}], channel stride 1"
            raise ValueError(mismatch("q", expected, list(q.shape)))
        for name, x, kinds in (("q", q, DTYPES), ("mask", mask, ("bool", *DTYPES))):
            elsewhere = None if x is None else host.why_not_here(x)
            if elsewhere is not None:
                raise ValueError(mismatch(name, "an array on the cache's device", elsewhere))
            if x is not None and host.dtype(x) not in kinds:
                raise ValueError(mismatch(name, "dtype " + " or ".join(kinds), host.dtype(x)))
        if dtype not in DTYPES:
            raise ValueError(mismatch("dtype", " or ".join(DTYPES), dtype))
        if sinks is not None and math.prod(sinks.shape) != q.shape[1]:
            raise ValueError(mismatch("sinks", f"{q.shape[1]} values", f"shape {list(sinks.shape)}"))
        if mask is not None:
            full = (batch, q.shape[1], q.shape[2])
            if len(mask.shape) != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=False)):
                raise ValueError(mismatch("mask", f"shape {[*full]} or 1 each, columns", list(mask.shape)))

    # Crop, forks and what is held.

    def crop(self, length: int, row: int | None = None) -> None:
        """Keeps the first `length` positions of every sequence that is longer, or of one."""
        most = self.length if row is None else self._sequence(row).extent.length
        if not 0 <= length <= most:
            raise IndexError(mismatch("length", f"0 to {most}", length))
        lengths = self.lengths
        for b, own in enumerate(lengths):
            if row in (None, b):
                lengths[b] = min(own, length)
        if lengths == self.lengths:
            return
        plans = [s.ledger.crop(n) for s, n in zip(self.sequences, lengths, strict=True)]
        energies = [s.energies.before(self.host, n) for s, n in zip(self.sequences, lengths, strict=True)]
        self.carry_out(self.sequences, plans)
        for s, kept in zip(self.sequences, energies, strict=True):
            s.energies = kept

    def select(self, rows: Rows[int]) -> None:
        """Sequence i continues old sequence rows[i]; pages are shared."""
        for i, row in enumerate(rows):
            if not 0 <= row < len(self.sequences):
                raise IndexError(mismatch("rows", f"indices from 0 to {len(self.sequences) - 1}", f"{row} at {i}"))
        taken = [self.host.take(x, rows, 0) for x in self.rows]
        # A single continuation shares nothing.
        self.sequences = [
            self.sequences[row].fork() if row in rows[:i] or row in rows[i + 1 :] else self.sequences[row]
            for i, row in enumerate(rows)
        ]
        self.rows = taken

    def extend(self, other: Cache) -> None:
        """Appends a copy of the sequences of another cache of the same layer and window. Pages are shared where both
        have one pool, else copied."""
        if (self.constants, self.window) != (other.constants, other.window):
            raise ValueError(mismatch("other", "a cache of the same recipe, shapes and window", "another"))
        if not other.sequences:
            return
        shared = other.pool is self.pool
        taken = [s.fork() if shared else s.moved(other.pool, self.pool) for s in other.sequences]
        room = max([self.sink_limit, *(x[0].shape[2] for x in (self.rows, other.rows) if x)])
        parts = [x._with_room(room) for x in (self, other)]
        self.rows = [self.host.concatenate(x, 0) for x in zip(*parts, strict=True)]
        self.sequences = [*self.sequences, *taken]

    def add(self, count: int = 1) -> None:
        """Adds `count` empty sequences."""
        if self.rows:
            empty = self.host.zeros((count, *self.rows[0].shape[1:]), self.dtype)
            self.rows = [self.host.concatenate([x, empty], 0) for x in self.rows]
        self.sequences = [*self.sequences, *(self._empty() for _ in range(count))]

    def _with_room(self, room: int) -> list[Any]:
        """The rows of all sequences, with this capacity."""
        have = self.rows[0].shape[2] if self.rows else 0
        empty = self.host.zeros((self.batch, self.heads, room - have, self.dim), self.dtype)
        return [self.host.concatenate([x, empty], 2) for x in self.rows] if self.rows else [empty, empty]

    def repeat(self, times: int) -> None:
        if times < 1:
            raise ValueError(mismatch("times", "at least 1", times))
        self.select([b for b in range(len(self.sequences)) for _ in range(times)])

    def reset(self, row: int | None = None) -> None:
        """Back to empty, all of it or one sequence."""
        if row is None:
            self._forget()
        else:
            self.sequences[row] = self._empty()

    def clone(self) -> Cache:
        """An independent copy; pages are shared."""
        twin = copy.copy(self)
        twin.sequences = [s.fork() for s in self.sequences]
        twin.rows = [self.host.copy(x) for x in self.rows]
        return twin

    def save(self, write: Any) -> None:
        """Passes the cache, block by block, to write(memoryview), as the core's (docs/format.md)."""
        saved.save(self, write)

    def load(self, readinto: Any) -> None:
        """Takes a saved cache of the same configuration, this one's or the core's, into this empty one."""
        saved.load(self, readinto)

    def record_past(self, on: bool) -> None:
        self.recording = bool(on)

    def dense(self, values: bool, first: int, count: int, rows: Rows[int] | None = None) -> Any:
        """Keys or values of positions [first, first + count), dequantised where sealed, of these sequences or all:
        [batch, kv_heads, count, head_dim], float32 where anything is sealed, else the cache's dtype."""
        rows = range(self.batch) if rows is None else rows
        held = [self._sequence(row) for row in rows]
        least = min((s.extent.length for s in held), default=0)
        if first < 0 or count < 0 or first + count > least:
            raise IndexError(mismatch("first, count", f"positions within 0 to {least}", f"{first}, {count}"))
        extents = [s.extent for s in held]
        for x in extents:
            if first < x.evicted:
                raise IndexError(mismatch("first", f"at least {x.evicted}, the oldest token held", first))
        dtype = "float32" if any(x.pages for x in extents) else self.dtype
        out = self.host.zeros((len(held), self.heads, count, self.dim), dtype)
        if not count:
            return out
        for b, (row, s, x) in enumerate(zip(rows, held, extents, strict=True)):

            def put(position: int, rows: Any, b: int = b) -> None:
                lo, hi = max(position, first), min(position + rows.shape[1], first + count)
                if lo < hi:
                    out[b, :, lo - first : hi - first] = self.host.cast(rows[:, lo - position : hi - position], dtype)

            exact = self.rows[int(values)][row]
            put(x.start, exact[:, : x.sinks])
            begin = x.start + self.sink_limit + x.first_page * PAGE  # of the first page held
            low, high = (first - begin) // PAGE, -((begin - first - count) // PAGE)
            wanted = s.ledger.pages[max(low, 0) : max(high, 0)]
            if wanted:
                put(begin + max(low, 0) * PAGE, self.dequantised(s, wanted, values))
            # Rows that are still exact take precedence over pages sealed during the last call.
            put(x.window_position, exact[:, self.sink_limit : self.sink_limit + x.window_rows])
        return out

    def arrays(self) -> list[Any]:
        """Everything held, each array once."""
        held = [self.pool.slab, *self.rows, self.given_k, self.given_v]
        held += [x for s in self.sequences for x in (s.lambda_, *(rows for _, rows in s.energies.parts))]
        return list({id(x): x for x in held if x is not None}.values())

    def nbytes(self) -> int:
        """Bytes of the slab with its slack, exact rows by capacity, lambda and the energies kept for it, and what
        shared() lists."""
        return sum(x.nbytes for x in self.arrays()) + sum(nbytes for _, nbytes, _ in self.shared())

    def shared(self) -> list[tuple[int, int, bool]]:
        """(identity, bytes, on_device) of the part of nbytes() that other caches may hold as well: a sum over caches
        counts an identity once."""
        return self.constants.shared()

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        return [s.extent.length for s in self.sequences]

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def first(self) -> int:
        return max((s.extent.evicted for s in self.sequences), default=0)

    def sealed_tokens(self, row: int) -> int:
        return self._sequence(row).extent.sealed_tokens

    def exact_tokens(self, row: int) -> int:
        x = self._sequence(row).extent
        return x.sinks + x.window_rows

    def page_count(self, row: int) -> int:
        return self._sequence(row).extent.pages

    def lambda_(self, row: int) -> list[float]:
        """Flat [kv_heads * head_dim]; empty before it is fixed."""
        values = self.lambda_k(self._sequence(row))
        return [] if values is None else values.flatten().tolist()

    def page_codes(self, row: int, index: int, head: int) -> tuple[bytes, bytes]:
        """Codes of a sealed head slice in canonical order: (keys, values)."""
        size = self.constants.tables.head_bytes
        pages = self._sequence(row).ledger.pages
        for name, value, end in (("index", index, len(pages)), ("head", head, self.heads)):
            if not 0 <= value < end:
                raise IndexError(mismatch(name, f"0 to {end - 1}", value))
        page = self.pool.slab[pages[index], head * size : (head + 1) * size]
        return self.constants.tables.canonical(self.host.numpy(page).tobytes())

    def _sequence(self, row: int) -> Sequence:
        if not 0 <= row < len(self.sequences):
            raise IndexError(mismatch("row", f"0 to {len(self.sequences) - 1}", row))
        return self.sequences[row]


def _spans(spans: Rows[Span] | None, batch: int, rows: int) -> list[Span]:
    """Each sequence's rows."""
    if spans is None:
        return [(0, rows)] * batch
    found = [(int(lo), int(hi)) for lo, hi in spans]
    if len(found) != batch or not all(0 <= lo <= hi <= rows for lo, hi in found):
        raise ValueError(mismatch("spans", f"{batch} ranges within 0 to {rows}", found))
    return found


def _integers(name: str, x: Any, count: int) -> list[int]:
    """The numbers of an int32 array of `count`."""
    values = x.tolist()
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(type(value) is int and abs(value) < 2**31 for value in values):
        raise ValueError(mismatch(name, f"{count} int32 values", values))
    return values
