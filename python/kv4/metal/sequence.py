"""One sequence: its ledger (kv4._core.Ledger, the policy) and its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

from kv4 import _core
from kv4.recipe import Recipe

from .host import Constants, Host

Span = tuple[int, int]  # a sequence's rows [first, last) of a call's arrays


class Pages:
    """Page bytes [pages, page_bytes] of a cache and its clones. A Page returns its place once nothing refers to it."""

    def __init__(self, host: Host, page_bytes: int) -> None:
        self.host = host
        self.page_bytes = page_bytes
        self.slab = host.empty((0, page_bytes), "uint8")
        self.count = 0
        self.free: list[int] = []

    def take(self, n: int, clear: bool = False) -> list[Page]:
        """n unused pages, uninitialised or zeroed."""
        places = [self.free.pop() for _ in range(min(n, len(self.free)))]
        pages = [Page(self, place) for place in places]
        have, need = self.slab.shape[0], self.count + n - len(pages)
        if need > have:
            slab = self.host.empty((max(need, have + have // 2 + 4), self.page_bytes), "uint8")
            if have:
                slab[:have] = self.slab
            self.slab = slab
        pages += [Page(self, place) for place in range(self.count, need)]
        self.count = need
        if clear and pages:
            zeros = self.host.zeros((n, self.page_bytes), "uint8")
            self.slab = self.host.put(self.slab, [page.place for page in pages], zeros)
        return pages

    def copies(self, source: Pages, places: list[int]) -> list[Page]:
        """Pages of the same bytes as those of a pool."""
        pages = self.take(len(places))
        if places:
            self.slab = self.host.put(self.slab, [page.place for page in pages], self.host.take(source.slab, places, 0))
        return pages


class Page:
    __slots__ = ("pages", "place")

    def __init__(self, pages: Pages, place: int) -> None:
        self.pages = pages
        self.place = place

    def __del__(self) -> None:
        self.pages.free.append(self.place)


@dataclasses.dataclass
class Energies:
    """Energies of the queries that lambda is learnt from (src/ledger/queries.h defines them), until it is fixed. Never
    written in place, so that forks may share them."""

    first: int = -1  # position of that first query; none so far
    parts: list[tuple[list[int], Any]] = dataclasses.field(default_factory=list)  # positions, [n, kv_heads, head_dim]

    def before(self, host: Host, length: int) -> Energies:
        """Those of positions below `length`."""
        if length <= self.first:
            return Energies()
        kept = []
        for positions, rows in self.parts:
            n = sum(position < length for position in positions)
            if n:
                kept.append((positions[:n], rows if n == len(positions) else host.copy(rows[:n])))
        return Energies(self.first, kept)


@dataclasses.dataclass
class Made:
    """The memory that a plan needs before it can be committed."""

    pages: list[Page] = dataclasses.field(default_factory=list)  # new ones
    filled: Page | None = None  # a copy of the last page held, where it is filled on and may be another's too
    lambda_: Any = None


@dataclasses.dataclass
class Sequence:
    ledger: _core.Ledger
    pages: dict[int, Page] = dataclasses.field(default_factory=dict)  # by id, which is the place
    energies: Energies = dataclasses.field(default_factory=Energies)
    lambda_: Any = None  # [kv_heads, head_dim] on the device
    alone: int = 0  # pages from this index on are nobody else's

    @classmethod
    def empty(cls, recipe: Recipe, window: int) -> Sequence:
        return cls(_core.Ledger(recipe, window))

    @property
    def extent(self) -> _core.Extent:
        return self.ledger.extent

    @property
    def page_end(self) -> int:
        x = self.ledger.extent
        return x.first_page + x.pages

    def fork(self) -> Sequence:
        """An independent copy that shares the pages."""
        self.alone = self.page_end
        return dataclasses.replace(self, ledger=self.ledger.fork(), pages=dict(self.pages))

    def commit(self, plan: _core.Plan, made: Made) -> None:
        """Commits an executed plan."""
        if made.filled is not None:
            self.alone = self.page_end - 1
            self.pages.pop(self.ledger.replace_last(made.filled.place))
            self.pages[made.filled.place] = made.filled
        self.ledger.commit(plan, [page.place for page in made.pages], self.energies.first >= 0)
        self.alone = min(self.alone, self.page_end - plan.new_pages)
        for place in plan.released:
            self.pages.pop(place)
        self.pages.update((page.place, page) for page in made.pages)
        state = self.extent.lambda_
        self.lambda_ = None if state == "open" else made.lambda_
        if state == "fixed":
            self.energies = Energies()

    def moved(self, source: Pages, to: Pages) -> Sequence:
        """A copy whose pages lie in another pool."""
        copied = to.copies(source, self.ledger.pages)
        ledger = self.ledger.moved([page.place for page in copied])
        return dataclasses.replace(self, ledger=ledger, pages={page.place: page for page in copied}, alone=0)


class Holding:
    """A Cache's state, for launches and sealing."""

    host: Host
    recipe: Recipe
    constants: Constants
    sequences: list[Sequence]
    pool: Pages
    rows: list[Any]
    dtype: str
    heads: int
    dim: int
    window: int
    sink_limit: int
    given_k: Any
    given_v: Any
    recording: bool
    format: _core.SavedFormat

    def lambda_k(self, s: Sequence) -> Any:
        return self.given_k if self.recipe.key.lambda_ == "given" else s.lambda_
