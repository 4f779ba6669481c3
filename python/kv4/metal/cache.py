"""The calls of the C++ core's Cache, its arrays on a Metal device.

Policy (what is sealed, dropped and visible when) is that of src/cache, in the same order and under the same names;
tests hold both to the same lengths, pages and codes. Numbers are the kernels'.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from kv4 import _core
from kv4.messages import mismatch
from kv4.recipe import Recipe

from .host import DTYPES, Host, shared_constants
from .launch import attend, dequantise
from .sealing import Sealing
from .sequence import MASKED, PAGE, UNKNOWN, VISIBLE, Page, PagePool, Sequence
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
        self.pool = PagePool()
        self.slab = host.empty((0, self.page_bytes), "uint8")
        self.recording = False
        self._forget()

    def _forget(self) -> None:
        self.sequences: list[Sequence] = []
        self.length = 0
        # Keys and values [batch, kv_heads, sinks + capacity, head_dim]; sinks lie before the window.
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
        fresh = [self.host.finite(x) for x in (k, v)]
        self.settle()
        if not self.sequences:
            self._forget()
            self.sequences = [Sequence(self.sink_limit) for _ in range(k.shape[0])]
        tokens = k.shape[2]
        if not tokens:
            return
        self._make_room(tokens)
        for rows, x in zip(self.rows, fresh, strict=True):
            if len({s.count for s in self.sequences}) == 1:
                first = self.sink_limit + self.sequences[0].count
                rows[:, :, first : first + tokens] = x
                continue
            for b, s in enumerate(self.sequences):
                first = self.sink_limit + s.count
                rows[b, :, first : first + tokens] = x[b]
        for s in self.sequences:
            s.seen += bytes([UNKNOWN]) * tokens
            s.length += tokens
        self.length += tokens

    def _make_room(self, tokens: int) -> None:
        need = max(s.count for s in self.sequences) + tokens
        room = self.rows[0].shape[2] - self.sink_limit if self.rows else 0
        if need <= room:
            return
        if self.seals:
            decode = self.recipe.window + PAGE + self.sink_limit
            room = decode if need <= decode else need
        else:
            room = max(need, PAGE, need + need // 8)
        self._resize(room)

    # Attention: src/cache/attend.cpp.

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
        stepwise = tokens <= PAGE
        if partial:
            self._check_upto(upto, stepwise, seen)
        else:
            upto = self.length
        self._record(q, seen)
        if self.seals and stepwise:
            self._seal_until(self.length - 1)
        first_query = self.length - tokens
        begin, parts = 0, []
        while begin < tokens:
            end = tokens
            if stepwise:
                for s in self.sequences:
                    pages = self._visible_pages(s, first_query + begin, True)
                    end = next(
                        (t for t in range(begin + 1, end) if self._visible_pages(s, first_query + t, True) != pages),
                        end,
                    )
            views = []
            for b, s in enumerate(self.sequences):
                pages = self._visible_pages(s, first_query + begin, stepwise)
                views.append(self._view(b, s, pages, upto, first_query + begin, starts[b], limits[b], mask, start))
            part = slice(begin, end)
            done = attend(
                self,
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
            begin = end
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else self.host.concatenate(parts, 2)

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

    def _check_upto(self, upto: int, stepwise: bool, seen: Visibility) -> None:
        """The last query reads the most tokens packed: those due before it, by the masks as the call leaves them."""
        if not self.seals:
            return
        for b, held in enumerate(self.sequences):
            s = held.fork()
            _note(b, s, seen)
            due = s.pages_due(self.length - 1, self.recipe.window) if stepwise else 0
            pages = max(due, s.released_pages())
            sealed = s.presumed_start() + s.sink_limit + pages * PAGE
            if pages > s.first_page and upto < sealed:
                raise IndexError(mismatch("upto", f"at least {sealed}, the end of the sealed tokens", upto))

    def _record(self, q: Any, seen: Visibility) -> None:
        """Remembers which exact tokens the call's queries see, and the energies of the first queries."""
        if not self.seals:
            return
        tokens = q.shape[2]
        limit = self.recipe.sinks + self.recipe.window + PAGE
        for b, s in enumerate(self.sequences):
            _note(b, s, seen)
            energy = s.energy
            if self.recipe.key.lambda_ != "auto" or (s.lambda_ is not None and energy.rows is None):
                continue
            first_query = self.length - tokens
            if energy.rows is not None and first_query - energy.first >= limit:
                continue
            visible = [t for t in range(tokens) if seen.visible(b, t, first_query + t)]
            if energy.rows is None:
                if not visible:
                    continue
                energy.first = first_query + visible[0]
                energy.rows = self.host.zeros((limit, self.heads, self.dim), "float32")
                energy.filled = bytearray(limit)
            slots = [(t, first_query + t - energy.first) for t in visible]
            slots = [(t, slot) for t, slot in slots if 0 <= slot < limit]
            if not slots:
                continue
            queries, places = ([slot[i] for slot in slots] for i in (0, 1))
            rows = self.host.energies(q, b, queries, self.heads)
            energy.rows = self.host.put(energy.rows, places, rows)
            for _, slot in slots:
                energy.filled[slot] = 1

    def _visible_pages(self, s: Sequence, position: int, stepwise: bool) -> int:
        """Pages that a query at `position` reads packed: those due before its token came."""
        due = s.pages_due(position, self.recipe.window) if stepwise and s.anchored else 0
        return min(max(due, s.released_pages()), s.page_end)

    def _view(
        self, b: int, s: Sequence, pages: int, upto: int, query: int, start: int, limit: int, mask: Any, given: Any
    ) -> tuple:
        """One sequence as MetalTables.attend reads it; offsets are elements of self.rows[0] and self.rows[1]."""
        head = self.rows[0].shape[2] * self.dim
        base = b * self.heads * head

        def exact(row: int, position: int, count: int) -> tuple[int, ...]:
            at = base + row * self.dim
            return (position, count, at, head, self.dim, at, head, self.dim)

        sets = [exact(0, s.start, max(0, min(upto - s.start, s.sinks)))]
        skip = max(0, s.page_position(pages) - s.window_position) if s.pages else 0
        held = max(0, min(upto - s.window_position, s.count))
        sets.append(exact(self.sink_limit + skip, s.window_position + skip, max(0, held - skip)))
        table = [page.index for page in s.pages[: pages - s.first_page]]
        position = s.page_position(s.first_page) if s.pages else 0
        return (
            table,
            position,
            PAGE,
            query,
            start if given is not None else -(2**31),
            limit,
            self.lambda_k(s) is not None or self.given_v is not None,
            sets,
        )

    # Crop, forks and what is held: src/cache/edit.cpp.

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions of every sequence."""
        if not 0 <= length <= self.length:
            raise IndexError(mismatch("length", f"0 to {self.length}", length))
        if length == self.length:
            return
        for s in self.sequences:
            if s.evicted > max(0, length - self.window + 1):
                least = s.evicted + self.window - 1
                text = f"at least {least} (older tokens left the sliding window), or 0 by reset"
                raise IndexError(mismatch("length", text, length))
        opened = [self._opened(b, s, length) for b, s in enumerate(self.sequences)]
        for b, s in enumerate(self.sequences):
            self._crop_sequence(b, s, length, opened[b])
        self.length = length

    def _opened(self, b: int, s: Sequence, n: int) -> list[Any]:
        """Keys and values [kv_heads, rows, head_dim] of the sealed tokens below n of the page that n cuts."""
        if not s.anchored or not s.body <= n < s.window_position:
            return []
        index, rows = divmod(n - s.body, PAGE)
        if not rows:
            return []
        page = s.pages[index - s.first_page]
        return [
            self.host.cast(dequantise(self, b, [page.index], values)[:, :rows], self.dtype) for values in (False, True)
        ]

    def _crop_sequence(self, b: int, s: Sequence, n: int, opened: list[Any]) -> None:
        s.length = n
        energy = s.energy
        if n <= energy.first:
            s.energy = type(energy)()
        else:
            for t in range(n - energy.first, len(energy.filled)):
                energy.filled[t] = 0
        if not s.anchored or n >= s.window_position:
            if s.anchored:
                keep = min(max(s.pages_due(n, self.recipe.window), s.released_pages()), s.page_end)
                del s.pages[keep - s.first_page :]
            del s.seen[max(0, n - s.window_position) :]
            s.window_position = min(s.window_position, n)
        elif n >= s.body:
            index, rows = divmod(n - s.body, PAGE)
            for x, dense in zip(self.rows, opened, strict=False):
                x[b, :, self.sink_limit : self.sink_limit + rows] = dense
            del s.pages[index - s.first_page :]
            s.window_position = s.page_position(index)
            s.seen = bytearray([VISIBLE]) * rows
        else:  # into the sinks, or before them: no longer anchored
            count = max(0, n - s.start)
            first = self.sink_limit
            for x in self.rows:
                x[b, :, first : first + s.sinks] = self.host.copy(x[b, :, : s.sinks])
            s.window_position = min(s.start, n)
            s.seen = bytearray([VISIBLE]) * count
            s.sinks, s.first_page, s.start, s.anchored = 0, 0, 0, False
            s.pages.clear()
        if not s.pages and s.energy.rows is not None:
            s.lambda_ = None

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
        """A cache of its own. Each cache writes to its own slab, so pages are copied."""
        twin = copy.copy(self)
        twin.pool = PagePool()
        twin.sequences = [s.fork() for s in self.sequences]
        moved: dict[int, Page] = {}
        for s in twin.sequences:
            for page in s.pages:
                if page.index not in moved:
                    moved[page.index] = twin.pool.allocate(1)[0]
            s.pages = [moved[page.index] for page in s.pages]
        none = self.host.empty((0, self.page_bytes), "uint8")
        twin.slab = self.host.take(self.slab, list(moved), 0) if moved else none
        twin.rows = [self.host.copy(x) for x in self.rows]
        return twin

    def record_past(self, on: bool) -> None:
        self.recording = bool(on)

    def dense(self, values: bool, first: int, count: int) -> Any:
        """Keys or values of positions [first, first + count), dequantised where sealed: [batch, kv_heads, count,
        head_dim], float32 where anything is sealed, else the cache's dtype."""
        if first < 0 or count < 0 or first + count > self.length:
            raise IndexError(mismatch("first, count", f"positions within 0 to {self.length}", f"{first}, {count}"))
        for s in self.sequences:
            if first < s.evicted:
                raise IndexError(mismatch("first", f"at least {s.evicted}, the oldest token held", first))
        dtype = "float32" if any(s.pages for s in self.sequences) else self.dtype
        out = self.host.zeros((len(self.sequences), self.heads, count, self.dim), dtype)
        if not count:
            return out
        for b, s in enumerate(self.sequences):

            def put(position: int, rows: Any, b: int = b) -> None:
                lo, hi = max(position, first), min(position + rows.shape[1], first + count)
                if lo < hi:
                    out[b, :, lo - first : hi - first] = self.host.cast(rows[:, lo - position : hi - position], dtype)

            rows = self.rows[int(values)][b]
            put(s.start, rows[:, : s.sinks])
            wanted = [
                (i, page.index)
                for i, page in enumerate(s.pages, s.first_page)
                if s.page_position(i) < first + count and s.page_position(i + 1) > first
            ]
            if wanted:
                dense = dequantise(self, b, [index for _, index in wanted], values)
                for n, (i, _) in enumerate(wanted):
                    put(s.page_position(i), dense[:, n * PAGE : (n + 1) * PAGE])
            # Rows still exact win over pages sealed during the last call.
            put(s.window_position, rows[:, self.sink_limit : self.sink_limit + s.count])
        return out

    def arrays(self) -> list[Any]:
        """Everything held, each array once."""
        held = [self.slab, *self.rows, self.given_k, self.given_v]
        held += [x for s in self.sequences for x in (s.lambda_, s.energy.rows)]
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
        return max((s.evicted for s in self.sequences), default=0)

    def sealed_tokens(self, row: int) -> int:
        return len(self._row(row).pages) * PAGE

    def exact_tokens(self, row: int) -> int:
        s = self._row(row)
        return s.sinks + s.count

    def page_count(self, row: int) -> int:
        return len(self._row(row).pages)

    def lambda_(self, row: int) -> list[float]:
        """Flat [kv_heads * head_dim]; empty before it is fixed."""
        values = self.lambda_k(self._row(row))
        return [] if values is None else values.flatten().tolist()

    def page_codes(self, row: int, index: int, head: int) -> tuple[bytes, bytes]:
        """Codes of a sealed head slice in canonical order: (keys, values)."""
        size = self.constants.tables.head_bytes
        pages = self._row(row).pages
        for name, value, end in (("index", index, len(pages)), ("head", head, self.heads)):
            if not 0 <= value < end:
                raise IndexError(mismatch(name, f"0 to {end - 1}", value))
        page = self.slab[pages[index].index, head * size : (head + 1) * size]
        return self.constants.tables.canonical(self.host.numpy(page).tobytes())

    def _row(self, row: int) -> Sequence:
        if not 0 <= row < len(self.sequences):
            raise IndexError(mismatch("row", f"0 to {len(self.sequences) - 1}", row))
        return self.sequences[row]


def _note(b: int, s: Sequence, seen: Visibility) -> None:
    """Which exact tokens of sequence b the call's queries see."""
    for j, known in enumerate(s.seen):
        if known != VISIBLE:
            s.seen[j] = VISIBLE if seen.seen(b, s.window_position + j) else MASKED


def _integers(name: str, x: Any, count: int) -> list[int]:
    """The numbers of an int32 array of `count`."""
    values = x.tolist()
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(type(value) is int and abs(value) < 2**31 for value in values):
        raise ValueError(mismatch(name, f"{count} int32 values", values))
    return values
