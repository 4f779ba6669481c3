"""What a step of a server asks of kv4: rows per sequence, pages that become full, and pieces for attention.

A query reads its newest 64 to 127 tokens from exact rows and older ones from pages, by its position alone: what a token
becomes does not depend on how a prompt was cut into steps, on prefix-cache hits or on preemption, and a page's bytes
follow from its tokens. So the rows of a prompt are attended to in pieces that end where pages end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kv4._core import PAGE_TOKENS as PAGE


@dataclass
class Step:
    """The arithmetic of one step, all int32. n sequences, p pieces of them."""

    queries: np.ndarray  # [n + 1] rows, cumulative
    lengths: np.ndarray  # [n] tokens with those of the step
    begin: np.ndarray  # [n] positions: pages from here ...
    end: np.ndarray  # [n] ... to here become full in this step
    source: np.ndarray  # [p] the sequence of a piece
    piece_queries: np.ndarray  # [p + 1]
    piece_lengths: np.ndarray  # [p]
    piece_sealed: np.ndarray  # [p] tokens that the piece reads from pages
    rows: int = 0
    most_pages: int = 0
    kept: dict = field(default_factory=dict)  # what a host makes of it for its layers

    @property
    def pieces(self) -> int:
        return len(self.source)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Of a workspace that serves the step: the same for all layers. By powers of two, so that a sequence which
        grows by a token does not ask again and again."""
        rows = max(np.diff(self.piece_queries).max(initial=1), np.diff(self.queries).max(initial=1))
        needed = {
            "sequences": max(self.pieces, len(self.lengths)),
            "most_pages": max(self.most_pages, 1),
            "most_queries": rows,
            "longest": self.lengths.max(initial=1),
            "all": self.piece_lengths.sum(dtype=np.int64),
        }
        return {name: 1 << max(int(x) - 1, 0).bit_length() for name, x in needed.items()}


def plan(queries: np.ndarray, lengths: np.ndarray, sealing: bool) -> Step:
    """Of cumulative rows [n + 1] and lengths [n], a sequence's rows being its newest. Not sealing: all stays exact."""
    queries, lengths = queries.astype(np.int64), lengths.astype(np.int64)
    counts = np.diff(queries)
    # A row of padding, in a batch of a fixed size, has a length and no query.
    computed = np.where(counts > 0, lengths - counts, lengths)
    begin, end = computed // PAGE * PAGE, lengths // PAGE * PAGE
    if not sealing:
        begin = end = np.zeros_like(lengths)
        pieces = (counts > 0).astype(np.int64)
    else:
        pieces = np.where(counts > 0, (lengths - 1) // PAGE - computed // PAGE + 1, 0)
    source = np.repeat(np.arange(len(lengths)), pieces)
    if sealing:
        index = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + computed[source] // PAGE
        first = np.maximum(computed[source], index * PAGE)
        piece_lengths = np.minimum(lengths[source], (index + 1) * PAGE)
        sealed = np.maximum(index - 1, 0) * PAGE
    else:
        first, piece_lengths, sealed = computed[source], lengths[source], np.zeros_like(source)
    piece_queries = np.concatenate([[0], np.cumsum(piece_lengths - first)])
    return Step(
        *(x.astype(np.int32) for x in (queries, lengths, begin, end, source, piece_queries, piece_lengths, sealed)),
        rows=int(queries[-1]),
        most_pages=int(((end - begin) // PAGE).max(initial=0)),
    )
