"""Which tokens a call's queries see: src/cache/visibility.h on the host."""

from __future__ import annotations

import torch


class Visibility:
    """starts, windows: by row, positions and numbers of tokens (0 = all). mask [batch or 1, q_heads or 1, T or 1,
    columns] or None, column j being position j + offset; a general mask is fetched from the device, once."""

    def __init__(
        self,
        length: int,
        queries: int,
        causal: bool,
        starts: list[int],
        windows: list[int],
        mask: torch.Tensor | None,
        offset: int,
    ) -> None:
        self.first_query = length - queries
        self.queries = queries
        self.causal, self.starts, self.windows, self.offset = causal, starts, windows, offset
        self.general = None
        if mask is not None:
            if mask.dtype is not torch.bool:
                # Additive masks hide by -infinity or by the lowest number of their dtype.
                lowest = -65504.0 if mask.dtype is torch.float16 else -1e30
                mask = mask > lowest
            visible = mask.any(1).expand(len(starts), queries, mask.shape[-1])
            self.general = visible.cpu().numpy()

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
