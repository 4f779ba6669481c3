"""Which tokens a sequence's queries see: src/cache/visibility.h on the host."""

from __future__ import annotations

import numpy as np


class Visibility:
    """input, span: the sequence's rows of the call. start, window: a position, and a number of tokens (0 = all).
    general: bool [rows, columns], what a general mask lets any head see, column j being position j + offset."""

    def __init__(
        self,
        length: int,
        input_: int,
        span: tuple[int, int],
        causal: bool,
        start: int,
        window: int,
        general: np.ndarray | None,
        offset: int,
    ) -> None:
        self.input, self.row, self.queries = input_, span[0], span[1] - span[0]
        self.first_query = length - self.queries
        self.causal, self.start, self.window, self.offset = causal, start, window, offset
        self.general = None if general is None else general[span[0] : span[1]]

    def _sees(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool: whether the query row sees the position, by all but a general mask; the arrays broadcast."""
        at = self.first_query + queries
        sees = (positions >= self.start) & (positions >= 0)
        if self.causal:
            sees = sees & (positions <= at)
        if self.window:
            sees = sees & (positions > at - self.window)
        return sees

    def seen(self, first: int, count: int) -> np.ndarray:
        """bool [count]: whether any query of the call sees positions [first, first + count)."""
        positions = np.arange(first, first + count)
        if self.general is None:
            # The query at the token's own position, or else the first one, has the widest view of it.
            return self._sees(np.clip(positions - self.first_query, 0, self.queries - 1), positions)
        columns = positions - self.offset
        inside = (columns >= 0) & (columns < self.general.shape[1])
        seen = np.zeros(count, bool)
        queries = np.arange(self.queries)[:, None]
        seen[inside] = (self.general[:, columns[inside]] & self._sees(queries, positions[inside])).any(0)
        return seen

    def see_themselves(self) -> np.ndarray:
        """bool [queries]: whether a query sees its own token; those of padding do not."""
        queries = np.arange(self.queries)
        positions = self.first_query + queries
        sees = self._sees(queries, positions)
        if self.general is not None:
            columns = positions - self.offset
            inside = (columns >= 0) & (columns < self.general.shape[1])
            sees = sees & inside
            sees[inside] &= self.general[queries[inside], columns[inside]]
        return sees
