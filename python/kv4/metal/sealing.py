"""When tokens are sealed, dropped and evicted: what `src/cache/seal.cpp` is to the C++ cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kv4 import _core

from .launch import seal
from .sequence import MASKED, PAGE, Page, PagePool, Sequence

if TYPE_CHECKING:
    from kv4.recipe import Recipe

    from .host import Constants, Host


class Sealing:
    """The part of a Cache that moves tokens from the window into pages and out of sight."""

    host: Host
    recipe: Recipe
    constants: Constants
    sequences: list[Sequence]
    pool: PagePool
    slab: Any  # uint8 [pages, page_bytes]
    rows: list[Any]
    dtype: str
    heads: int
    dim: int
    window: int
    sink_limit: int
    length: int
    seals: bool
    recording: bool
    given_k: Any

    def _resize(self, room: int) -> None:
        """Window rows for `room` tokens; what is held stays."""
        shape = (len(self.sequences), self.heads, self.sink_limit + room, self.dim)
        old, self.rows = self.rows, [self.host.zeros(shape, self.dtype) for _ in range(2)]
        for x, rows in zip(old, self.rows, strict=False):
            kept = min(shape[2], x.shape[2])
            rows[:, :, :kept] = x[:, :, :kept]

    def _drop_front(self, b: int, count: int) -> None:
        """Drops the first `count` rows of a window."""
        if count <= 0:
            return
        s = self.sequences[b]
        first, kept = self.sink_limit, s.count - count
        if kept:
            for x in self.rows:
                x[b, :, first : first + kept] = self.host.copy(x[b, :, first + count : first + count + kept])
        del s.seen[:count]
        s.window_position += count

    def seal(self) -> None:
        self.settle()

    def settle(self) -> None:
        if self.seals:
            self._seal_until(self.length)
        for b, s in enumerate(self.sequences):
            if self.seals and s.anchored:
                due = min(s.page_end, s.pages_due(self.length, self.recipe.window))
                self._drop_front(b, min(s.page_position(due) - s.window_position, s.count))
                if s.lambda_ is not None and s.released_pages() > 0:
                    s.energy = type(s.energy)()
            self._evict(b, s)
        self._shrink()

    def _shrink(self) -> None:
        # After a long prefill the rows are far more than decoding needs.
        if not self.rows or not self.sequences:
            return
        most = max(s.count for s in self.sequences)
        room = (self.recipe.window + PAGE if self.seals else self.window + PAGE) + self.sink_limit
        if (self.seals or self.window) and most <= room < self.rows[0].shape[2] - self.sink_limit:
            self._resize(room)

    def _anchor(self, b: int) -> None:
        s = self.sequences[b]
        start = s.presumed_start()
        skip = start - s.window_position
        sinks = max(0, min(s.sink_limit, s.count - skip))
        if sinks:
            first = self.sink_limit + skip
            for x in self.rows:
                x[b, :, :sinks] = self.host.copy(x[b, :, first : first + sinks])
        s.sinks, s.start, s.anchored, s.first_page = sinks, start, True, 0
        self._drop_front(b, skip + sinks)

    def _evict(self, b: int, s: Sequence) -> None:
        if not self.window or self.recording:
            return
        needed = s.length - self.window + 1
        before = s.first_held()
        if needed <= before:
            return
        self._evict_below(b, s, needed)
        if s.first_held() > before:
            s.evicted = s.first_held()

    def _evict_below(self, b: int, s: Sequence, needed: int) -> None:
        if not self.seals:
            rows = min(needed - s.window_position, s.count)
            if rows >= PAGE // 2:
                self._drop_front(b, rows)
            return
        if not s.anchored:
            if needed < s.presumed_start() + s.sink_limit + PAGE:
                return
            self._anchor(b)
        if needed >= s.body:
            s.sinks = 0
        while s.pages and s.page_position(s.first_page + 1) <= needed:
            del s.pages[0]
            s.first_page += 1
        if not s.pages and s.window_position <= s.page_position(s.first_page):
            rows = min(needed - s.window_position, s.count) // PAGE * PAGE
            if rows > 0:
                self._drop_front(b, rows)
                s.first_page += rows // PAGE

    def _fix_lambda(self, b: int, s: Sequence) -> None:
        """Once per sequence, in float64 on the host, as src/cache/seal.cpp does, which waits for the device."""
        if self.recipe.key.lambda_ != "auto" or s.lambda_ is not None:
            return
        blocks = 1 + self.recipe.window // PAGE
        first = s.page_position(s.page_end) - s.window_position
        keys = self.rows[0][b, :, self.sink_limit + first : self.sink_limit + first + blocks * PAGE]
        keys = self.host.numpy(keys).astype(np.float64)
        used = np.array([x != MASKED for x in s.seen[first : first + blocks * PAGE]])
        energy = np.zeros((self.heads, self.dim))
        for block in range(blocks):
            part = keys[:, block * PAGE : (block + 1) * PAGE][:, used[block * PAGE : (block + 1) * PAGE]]
            energy += ((part - part.mean(1, keepdims=True)) ** 2).sum(1) if part.shape[1] else 0.0
        if not used.any():
            return
        filled = np.frombuffer(bytes(s.energy.filled), np.uint8) != 0
        query = np.zeros((self.heads, self.dim))
        if s.energy.rows is not None:
            query = self.host.numpy(s.energy.rows).astype(np.float64)[filled].sum(0)
        values = np.stack([_core.lambda_from_energies(query[h], energy[h]) for h in range(self.heads)])
        s.lambda_ = self.host.table(values)

    def _seal_until(self, n: int) -> None:
        for b, s in enumerate(self.sequences):
            due = s.pages_due(n, self.recipe.window)
            if due == 0 or (s.anchored and due <= s.page_end):
                continue
            if not s.anchored:
                self._anchor(b)
            count = due - s.page_end
            if count <= 0:
                continue
            self._fix_lambda(b, s)
            if (
                self.window
                and not self.recording
                and not s.pages
                and s.window_position == s.page_position(s.first_page)
            ):
                needed = s.length - self.window + 1
                gone = min((needed - s.window_position) // PAGE, count)
                if needed > s.window_position and gone > 0 and n == self.length:
                    self._drop_front(b, gone * PAGE)
                    s.first_page += gone
                    count -= gone
                    if not count:
                        continue
            first = s.page_position(s.page_end) - s.window_position
            skip = bytes(x == MASKED for x in s.seen[first : first + count * PAGE])
            fresh = self._allocate(count)
            seal(self, b, first, skip, [page.index for page in fresh])
            s.pages += fresh

    def _allocate(self, count: int) -> list[Page]:
        pages = self.pool.allocate(count)
        have, need = self.slab.shape[0], self.pool.count
        if need > have:
            slab = self.host.empty((max(need, have + have // 2 + 4), self.page_bytes), "uint8")
            if have:
                slab[:have] = self.slab
            self.slab = slab
        return pages

    @property
    def page_bytes(self) -> int:
        return self.constants.tables.page_bytes

    def lambda_k(self, s: Sequence) -> Any:
        return self.given_k if self.recipe.key.lambda_ == "given" else s.lambda_
