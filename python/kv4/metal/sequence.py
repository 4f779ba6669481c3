"""One sequence of a layer's cache, and the arithmetic of positions: what `src/cache/sequence.h` is to the C++ cache.

    [ dropped padding: start ][ sinks: S ][ page 0 ][ page 1 ] ... [ window ]

Page i covers positions body + 64 i ... + 63, body = start + S. Until the sequence is anchored (at its first seal or
eviction) every token is in the window and start is not known. Nothing here knows a tensor but as something to keep.
"""

from __future__ import annotations

import dataclasses
from typing import Any

PAGE = 64
UNKNOWN, VISIBLE, MASKED = 0, 1, 2  # what attention has told about an exact token


class PagePool:
    """Numbers of pages in a slab. A Page gives its number back when nothing refers to it any more."""

    def __init__(self) -> None:
        self.count = 0
        self.free: list[int] = []

    def allocate(self, n: int) -> list[Page]:
        pages = []
        for _ in range(n):
            if self.free:
                index = self.free.pop()
            else:
                index, self.count = self.count, self.count + 1
            pages.append(Page(self, index))
        return pages


class Page:
    __slots__ = ("index", "pool")

    def __init__(self, pool: PagePool, index: int) -> None:
        self.pool = pool
        self.index = index

    def __del__(self) -> None:
        self.pool.free.append(self.index)


@dataclasses.dataclass
class Energy:
    """Energies of the visible queries before the first page is due, by position from `first`: rows
    [limit, kv_heads, head_dim] on the device, None until the first query."""

    first: int = 0
    rows: Any = None
    filled: bytearray = dataclasses.field(default_factory=bytearray)


@dataclasses.dataclass
class Sequence:
    sink_limit: int
    length: int = 0
    start: int = 0
    anchored: bool = False
    sinks: int = 0  # rows held
    first_page: int = 0  # index of pages[0]: earlier ones are evicted
    pages: list[Page] = dataclasses.field(default_factory=list)
    window_position: int = 0  # of window row 0
    seen: bytearray = dataclasses.field(default_factory=bytearray)  # per window row
    evicted: int = 0
    energy: Energy = dataclasses.field(default_factory=Energy)
    lambda_: Any = None  # [kv_heads, head_dim] on the device

    def fork(self) -> Sequence:
        """A copy that goes its own way. Energy rows are never written in place, so they may be shared."""
        energy = Energy(self.energy.first, self.energy.rows, bytearray(self.energy.filled))
        return dataclasses.replace(self, pages=list(self.pages), seen=bytearray(self.seen), energy=energy)

    @property
    def count(self) -> int:
        """Rows in the window."""
        return len(self.seen)

    @property
    def body(self) -> int:
        return self.start + self.sink_limit

    def page_position(self, index: int) -> int:
        return self.body + index * PAGE

    @property
    def page_end(self) -> int:
        return self.first_page + len(self.pages)

    def leading_masked(self) -> int:
        return next((i for i, x in enumerate(self.seen) if x != MASKED), len(self.seen))

    def presumed_start(self) -> int:
        """First position that has not been dropped as padding."""
        return self.start if self.anchored else self.window_position + self.leading_masked()

    def pages_due(self, n: int, window: int) -> int:
        """Pages that are sealed once n tokens are held: the window then keeps window ... window + 63."""
        return max(0, n - self.presumed_start() - self.sink_limit - window) // PAGE

    def released_pages(self) -> int:
        """Pages whose exact rows are gone."""
        if not self.anchored or not self.pages:
            return self.first_page
        return min(max((self.window_position - self.body) // PAGE, self.first_page), self.page_end)

    def first_held(self) -> int:
        """Smallest position still held."""
        if self.sinks:
            return self.start
        return self.page_position(self.first_page) if self.pages else self.window_position
