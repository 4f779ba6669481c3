"""Which tokens a call's queries see: src/cache/visibility.h on the host."""

from __future__ import annotations

import numpy as np


class Visibility:
    """starts, windows: by row, positions and numbers of tokens (0 = all). general: bool [batch or 1, T or 1, columns],
    what a general mask lets any head see, column j being position j + offset; or None."""

    def __init__(
        self,
        length: int,
        queries: int,
        causal: bool,
        starts: list[int],
        windows: list[int],
        general: np.ndarray | None,
        offset: int,
    ) -> None:
        self.first_query = length - queries
        self.queries = queries
        self.causal, self.starts, self.windows, self.offset = causal, starts, windows, offset
        self.general = general
        if general is not None:
            self.general = np.broadcast_to(general, (len(starts), queries, general.shape[-1]))

    def _sees(self, b: int, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool: whether the query row sees the position, by all but a general mask; the arrays broadcast."""
        at = self.first_query + queries
        sees = (positions >= self.starts[b]) & (positions >= 0)
        if self.causal:
            sees = sees & (positions <= at)
        if self.windows[b]:
            sees = sees & (positions > at - self.windows[b])
        return sees

    def seen(self, b: int, first: int, count: int) -> np.ndarray:
        """bool [count]: whether any query of the call sees positions [first, first + count)."""
        positions = np.arange(first, first + count)
        if self.general is None:
            # The query at the token's own position, or else the first one, has the widest view of it.
            return self._sees(b, np.clip(positions - self.first_query, 0, self.queries - 1), positions)
        columns = positions - self.offset
        inside = (columns >= 0) & (columns < self.general.shape[2])
        seen = np.zeros(count, bool)
        queries = np.arange(self.queries)[:, None]
        seen[inside] = (self.general[b][:, columns[inside]] & self._sees(b, queries, positions[inside])).any(0)
        return seen

    def see_themselves(self, b: int) -> np.ndarray:
        """bool [queries]: whether a query sees its own token; those of padding do not."""
        queries = np.arange(self.queries)
        positions = self.first_query + queries
        sees = self._sees(b, queries, positions)
        if self.general is not None:
            columns = positions - self.offset
            inside = (columns >= 0) & (columns < self.general.shape[2])
            sees = sees & inside
            sees[inside] &= self.general[b][queries[inside], columns[inside]]
        return sees
