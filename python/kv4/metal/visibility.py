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

    def visible(self, b: int, t: int, position: int) -> bool:
        query = self.first_query + t
        if position < self.starts[b] or (self.causal and position > query):
            return False
        if self.windows[b] and position <= query - self.windows[b]:
            return False
        if self.general is None:
            return True
        column = position - self.offset
        return 0 <= column < self.general.shape[2] and bool(self.general[b, t, column])

    def seen(self, b: int, position: int) -> bool:
        """True where any query of the call sees the position."""
        if self.general is None:
            # The query at the token's own position, or else the first one, has the widest view of it.
            own = min(max(position - self.first_query, 0), self.queries - 1)
            return self.visible(b, own, position)
        return any(self.visible(b, t, position) for t in range(self.queries))
