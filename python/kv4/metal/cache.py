"""The calls of the C++ core's Cache, its arrays on a Metal device.

Policy (what is sealed, dropped and visible when) is the library's own ledger (kv4._core.Ledger), one for each sequence;
numbers are the kernels'. Here are arrays and launches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from kv4 import _core
from kv4._core import PAGE_TOKENS as PAGE
from kv4.messages import mismatch
from kv4.recipe import Recipe

from .host import DTYPES, Host, shared_constants
from .launch import attend
from .sealing import Sealing
from .sequence import Energies, Page, Pages, Sequence
from .visibility import Visibility


class Cache(Sealing):
    """One layer's cache; the arguments are those of kv4._core.Cache, and the host of its arrays and kernels.

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
        # The core's own checks of every argument.
        _core.Cache(
            recipe,
            dtype=dtype,
            kv_heads=kv_heads,
            head_dim_k=head_dim_k,
            head_dim_v=head_dim_v,
            sliding_window=sliding_window,
            lambda_k=lambda_k,
            lambda_v=lambda_v,
            matrix_k=matrix_k,
            matrix_v=matrix_v,
        )
        self.constants = shared_constants(
            host,
            recipe,
            dtype=dtype,
            kv_heads=kv_heads,
            head_dim_k=head_dim_k,
            head_dim_v=head_dim_v,
            matrix_k=matrix_k,
            matrix_v=matrix_v,
        )
        self.host = host
        self.recipe = recipe
        self.dtype = dtype
        self.heads, self.dim, self.window = kv_heads, head_dim_k, sliding_window
        self.given_k, self.given_v = (
            None if x is None else host.table(np.asarray(x, np.float32)) for x in (lambda_k, lambda_v)
        )
        self.seals = recipe.seal == "page"
        self.sink_limit = recipe.sinks if self.seals else 0
        self.pool = Pages(host, self.constants.tables.page_bytes)
        self.recording = False
        self._forget()

    def _forget(self) -> None:
        self.sequences: list[Sequence] = []
        self.length = 0
        self.rows: list[Any] = []

    # Appending.

    def append(self, k: Any, v: Any) -> None:
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
        stored = [self.host.finite(x) for x in (k, v)]
        sequences = self.sequences or [Sequence.empty(self.recipe, self.window) for _ in range(k.shape[0])]
        tokens = k.shape[2]
        self.carry_out(sequences, [s.ledger.append(tokens, self.recording) for s in sequences], stored)
        self.sequences = sequences
        self.length += tokens

    def seal(self) -> None:
        """Seals what is due and lets go of the exact rows that were kept for a crop of the last call."""
        if self.sequences:
            self.carry_out(self.sequences, [s.ledger.settle(self.recording) for s in self.sequences])

    # Attention.

    def attended(
        self,
        q: Any,
        *,
        upto: int | None = None,
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
        [batch, q_heads, T, head_dim] in `dtype`, or `out`, which kernels that write in place fill; or with upto the
        partial states over positions below it: float32 [batch, q_heads, T, head_dim + 2], o, m and l side by side."""
        partial = upto is not None
        if partial and not 0 <= upto <= self.length:
            raise IndexError(mismatch("upto", f"0 to {self.length}", upto))
        if not self.sequences:
            raise RuntimeError(mismatch("q", "a cache that holds tokens", "an empty cache"))
        self._check_call(q, dtype, scale, softcap, sinks, mask)
        batch, tokens = len(self.sequences), q.shape[2]
        limits = [self.window if causal else 0] * batch if window is None else _integers("window", window, batch)
        starts = [0] * batch if start is None else [offset + x for x in _integers("start", start, batch)]
        seen = Visibility(
            self.length, tokens, causal, starts, limits, None if mask is None else self.host.seen(mask), offset
        )
        held, calls = self.rows, [self._call(b, s, q, seen) for b, s in enumerate(self.sequences)]
        plans = [call[0] for call in calls]
        if any(plan.new_pages for plan in plans):
            self.rows = self._moved(self.sequences, plans, anew=True)
        try:
            nexts = [self._next(s, *call) for s, call in zip(self.sequences, calls, strict=True)]
            if not partial:
                upto = self.length
            elif self.seals:
                self._check_upto(upto, tokens, nexts)
            parts = []
            for begin, end, views in self._runs(nexts, tokens, upto, starts, limits, start is not None):
                part = slice(begin, end)
                done = attend(
                    self,
                    nexts,
                    q if begin == 0 and end == tokens else q[:, :, part],
                    views,
                    out=None if out is None else out[:, :, part],
                    dtype=None if partial else dtype,
                    scale=scale,
                    softcap=softcap,
                    sinks=sinks,
                    causal=causal,
                    mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, part],
                    offset=offset,
                )
                parts.append(done)
        except BaseException:
            self.rows = held
            raise
        for s, plan in zip(nexts, plans, strict=True):
            if not plan.new_pages:
                s.commit(plan, [])
        self.sequences = nexts
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else self.host.concatenate(parts, 2)

    def _call(self, b: int, s: Sequence, q: Any, seen: Visibility) -> tuple[Any, Energies, list[Page], Any]:
        """What a call of attention does to a sequence: its plan, energies, new pages and lambda. The sequence itself is
        as it was."""
        x = s.extent
        rows = seen.seen(b, x.window_position, x.window_rows).tobytes() if self.seals else b""
        plan = s.ledger.attend(seen.queries, rows)
        energies = self._with_energies(q, b, s, seen)
        return plan, energies, *self._seal(b, s, plan, energies)

    @staticmethod
    def _next(s: Sequence, plan: Any, energies: Energies, pages: list[Page], lambda_: Any) -> Sequence:
        """The sequence that the call reads; one that seals nothing waits for commit."""
        after = s.fork() if pages else dataclasses.replace(s)
        after.energies, after.lambda_ = energies, lambda_
        if pages:
            after.commit(plan, pages)
        return after

    def _runs(
        self, sequences: list[Sequence], tokens: int, upto: int, starts: list[int], limits: list[int], given: bool
    ) -> Iterator[tuple[int, int, list[tuple]]]:
        """Runs of queries [begin, end) that read the same pages in every sequence, with each sequence's view."""
        first_query, stepwise = self.length - tokens, tokens <= PAGE
        begin = 0
        while begin < tokens:
            position = first_query + begin
            end = min(tokens, *(s.ledger.view_end(position, stepwise) - first_query for s in sequences))
            views = []
            for b, s in enumerate(sequences):
                view = s.ledger.view(position, stepwise, upto)
                views.append(self._view(b, s, view, position, starts[b] if given else -(2**31), limits[b]))
            yield begin, end, views
            begin = end

    def _with_energies(self, q: Any, b: int, s: Sequence, seen: Visibility) -> Energies:
        """The energies held of the first queries that see themselves, the call's included."""
        energies = s.energies
        if not self.seals or self.recipe.key.lambda_ != "auto" or s.extent.lambda_ == "fixed":
            return energies
        limit = self.recipe.sinks + self.recipe.window + PAGE
        if energies.first >= 0 and seen.first_query - energies.first >= limit:
            return energies
        own = [seen.first_query + int(t) for t in np.flatnonzero(seen.see_themselves(b))]
        first, positions = energies.wanted(own, limit)
        # A call may be repeated, with another mask: its queries' rows are the new ones.
        kept = energies.before(self.host, seen.first_query).parts if energies.first < seen.first_query else []
        if positions:
            rows = self.host.energies(q, b, [x - seen.first_query for x in positions], self.heads)
            kept = [*kept, (positions, rows)]
        return Energies(first, kept)

    def _check_call(self, q: Any, dtype: str, scale: float, softcap: float, sinks: Any, mask: Any) -> None:
        """What can be refused of a call before any of it is recorded."""
        batch, host = len(self.sequences), self.host
        fits = len(q.shape) == 4 and q.shape[0] == batch and q.shape[1] >= self.heads and q.shape[1] % self.heads == 0
        fits = fits and q.shape[3] == self.dim and 1 <= q.shape[2] <= self.length and host.strides(q)[-1] == 1
        if not fits:
            expected = f"shape [{batch}, a multiple of {self.heads}, 1 to {self.length}, {self.dim}], channel stride 1"
            raise ValueError(mismatch("q", expected, list(q.shape)))
        for name, x, kinds in (("q", q, DTYPES), ("mask", mask, ("bool", *DTYPES))):
            elsewhere = None if x is None else host.why_not_here(x)
            if elsewhere is not None:
                raise ValueError(mismatch(name, "an array on the cache's device", elsewhere))
            if x is not None and host.dtype(x) not in kinds:
                raise ValueError(mismatch(name, "dtype " + " or ".join(kinds), host.dtype(x)))
        if dtype not in DTYPES:
            raise ValueError(mismatch("dtype", " or ".join(DTYPES), dtype))
        if math.isnan(scale):
            raise ValueError(mismatch("scale", "a number", scale))
        if not softcap >= 0:
            raise ValueError(mismatch("softcap", "0 (none) or a positive number", softcap))
        if sinks is not None and math.prod(sinks.shape) != q.shape[1]:
            raise ValueError(mismatch("sinks", f"{q.shape[1]} values", f"shape {list(sinks.shape)}"))
        if mask is not None:
            full = (batch, q.shape[1], q.shape[2])
            if len(mask.shape) != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=False)):
                raise ValueError(mismatch("mask", f"shape {[*full]} or 1 each, columns", list(mask.shape)))

    def _check_upto(self, upto: int, tokens: int, sequences: list[Sequence]) -> None:
        """The last query reads the most tokens packed."""
        for s in sequences:
            view = s.ledger.view(self.length - 1, tokens <= PAGE, upto)
            sealed = view.pages_position + view.pages * PAGE
            if view.pages and upto < sealed:
                raise IndexError(mismatch("upto", f"at least {sealed}, the end of the sealed tokens", upto))

    def _view(self, b: int, s: Sequence, view: Any, query: int, start: int, limit: int) -> tuple:
        """One sequence as MetalTables.attend reads it; offsets are elements of self.rows[0] and self.rows[1]."""
        head = self.rows[0].shape[2] * self.dim

        def exact(row: int, rows: tuple[int, int]) -> tuple[int, ...]:
            at = b * self.heads * head + row * self.dim
            return (rows[0], rows[1] - rows[0], at, head, self.dim, at, head, self.dim)

        return (
            s.ledger.pages[: view.pages],
            view.pages_position if view.pages else 0,
            PAGE,
            query,
            start,
            limit,
            self.lambda_k(s) is not None or self.given_v is not None,
            [exact(0, view.sinks), exact(self._row(view.window[0], s.extent), view.window)],
        )

    # Crop, forks and what is held.

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions of every sequence."""
        if not 0 <= length <= self.length:
            raise IndexError(mismatch("length", f"0 to {self.length}", length))
        plans = [s.ledger.crop(length) for s in self.sequences]
        if length == self.length:
            return
        energies = [s.energies.before(self.host, length) for s in self.sequences]
        self.carry_out(self.sequences, plans)
        for s, kept in zip(self.sequences, energies, strict=True):
            s.energies = kept
        self.length = length

    def select(self, rows: Rows[int]) -> None:
        """Sequence i continues old sequence rows[i]; pages are shared."""
        for i, row in enumerate(rows):
            if not 0 <= row < len(self.sequences):
                raise IndexError(mismatch("rows", f"indices from 0 to {len(self.sequences) - 1}", f"{row} at {i}"))
        taken = [self.host.take(x, rows, 0) for x in self.rows]
        self.sequences = [self.sequences[row].fork() for row in rows]
        self.rows = taken

    def repeat(self, times: int) -> None:
        if times < 1:
            raise ValueError(mismatch("times", "at least 1", times))
        self.select([b for b in range(len(self.sequences)) for _ in range(times)])

    def reset(self) -> None:
        self._forget()

    def clone(self) -> Cache:
        """A cache of its own, which shares the pages."""
        twin = copy.copy(self)
        twin.sequences = [s.fork() for s in self.sequences]
        twin.rows = [self.host.copy(x) for x in self.rows]
        return twin

    def record_past(self, on: bool) -> None:
        self.recording = bool(on)

    def dense(self, values: bool, first: int, count: int) -> Any:
        """Keys or values of positions [first, first + count), dequantised where sealed: [batch, kv_heads, count,
        head_dim], float32 where anything is sealed, else the cache's dtype."""
        if first < 0 or count < 0 or first + count > self.length:
            raise IndexError(mismatch("first, count", f"positions within 0 to {self.length}", f"{first}, {count}"))
        extents = [s.extent for s in self.sequences]
        for x in extents:
            if first < x.evicted:
                raise IndexError(mismatch("first", f"at least {x.evicted}, the oldest token held", first))
        dtype = "float32" if any(x.pages for x in extents) else self.dtype
        out = self.host.zeros((len(self.sequences), self.heads, count, self.dim), dtype)
        if not count:
            return out
        for b, (s, x) in enumerate(zip(self.sequences, extents, strict=True)):

            def put(position: int, rows: Any, b: int = b) -> None:
                lo, hi = max(position, first), min(position + rows.shape[1], first + count)
                if lo < hi:
                    out[b, :, lo - first : hi - first] = self.host.cast(rows[:, lo - position : hi - position], dtype)

            rows = self.rows[int(values)][b]
            put(x.start, rows[:, : x.sinks])
            begin = x.start + self.sink_limit + x.first_page * PAGE  # of the first page held
            low, high = (first - begin) // PAGE, -((begin - first - count) // PAGE)
            wanted = s.ledger.pages[max(low, 0) : max(high, 0)]
            if wanted:
                put(begin + max(low, 0) * PAGE, self.dequantised(s, wanted, values))
            # Rows still exact win over pages sealed during the last call.
            put(x.window_position, rows[:, self.sink_limit : self.sink_limit + x.window_rows])
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
        """(identity, bytes, on_device) of the part of nbytes() that other caches may hold as well: who adds up caches
        counts an identity once."""
        return self.constants.shared()

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


def _integers(name: str, x: Any, count: int) -> list[int]:
    """The numbers of an int32 array of `count`."""
    values = x.tolist()
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(type(value) is int and abs(value) < 2**31 for value in values):
        raise ValueError(mismatch(name, f"{count} int32 values", values))
    return values
