"""Plans a server's step for kv4: rows per sequence, pages that become full, and pieces for attention.

A query reads its newest 64 to 127 tokens from exact rows and older ones from pages, by its position alone. Results
therefore do not depend on how a prompt was split into steps, on prefix-cache hits or on preemption, and a page's bytes
depend only on its tokens. Hence the rows of a prompt are attended to in pieces that end at page boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from kv4._core import PAGE_TOKENS as PAGE

# From so many rows of a chunk on, unpacking the pages that they see for FlashAttention is less work than reading them
# packed (docs/vllm.md).
LONG = 128


@dataclass
class Span:
    """Pieces with contiguous rows."""

    pieces: slice
    rows: slice
    queries: np.ndarray  # [pieces + 1] rows, cumulative, from 0

    @property
    def most_queries(self) -> int:
        return int(np.diff(self.queries).max(initial=0))


@dataclass
class Step:
    """The arithmetic of one step, all int32. n sequences, p pieces of them."""

    queries: np.ndarray  # [n + 1] rows, cumulative
    lengths: np.ndarray  # [n] tokens with those of the step
    begin: np.ndarray  # [n] positions: pages from here ...
    end: np.ndarray  # [n] ... to here become full in this step
    source: np.ndarray  # [p] the sequence of a piece
    piece_lengths: np.ndarray  # [p]
    piece_sealed: np.ndarray  # [p] tokens that the piece reads from pages
    spans: list[Span]
    left: np.ndarray  # [n] whether it is the host's to attend to: it has no pieces
    sealing: bool
    single: bool = False  # one row at most of each sequence: pieces are sequences
    rows: int = 0
    most_pages: int = 0
    kept: dict = field(default_factory=dict)  # what a host makes of it for its layers

    @property
    def pieces(self) -> int:
        return len(self.source)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Limits of a workspace for the step, the same for all layers. Rounded up to powers of two, so that a growing
        sequence does not need a new workspace at every token."""
        rows = max((span.most_queries for span in self.spans), default=1)
        needed = {
            "sequences": max(self.pieces, len(self.lengths)),
            "most_pages": max(self.most_pages, 1),
            "most_queries": max(rows, 1),
            "longest": self.lengths.max(initial=1),
            "all": self.piece_lengths.sum(dtype=np.int64),
        }
        return {name: 1 << max(int(x) - 1, 0).bit_length() for name, x in needed.items()}

    @cached_property
    def most_queries(self) -> int:
        """Rows of one sequence."""
        return int(np.diff(self.queries).max(initial=0))


def plan(queries: np.ndarray, lengths: np.ndarray, sealing: bool, leave: int | None = None) -> Step:
    """The step with these cumulative rows [n + 1] and lengths [n]; a sequence's rows are its newest. Without sealing
    all rows stay exact. leave: the host attends to prompts that begin in this step and to others' chunks of at least so
    many rows."""
    queries, lengths = queries.astype(np.int64), lengths.astype(np.int64)
    counts = np.diff(queries)
    # A padding row in a batch of fixed size has a length but no query.
    computed = np.where(counts > 0, lengths - counts, lengths)
    begin, end = computed // PAGE * PAGE, lengths // PAGE * PAGE
    single = counts.max(initial=0) <= 1
    if not sealing:
        begin = end = np.zeros_like(lengths)
        pieces = (counts > 0).astype(np.int64)
    else:
        pieces = np.where(counts > 0, (lengths - 1) // PAGE - computed // PAGE + 1, 0)
    if single:
        pieces = np.ones_like(counts)  # rows of padding too: tables and arrays are those of the sequences
    left = np.zeros_like(counts, bool)
    if leave is not None:
        left = (counts > 1) & ((computed == 0) | (counts >= leave))
    pieces = np.where(left, 0, pieces)
    source = np.repeat(np.arange(len(lengths)), pieces)
    if sealing:
        index = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + computed[source] // PAGE
        first = np.maximum(computed[source], index * PAGE)
        piece_lengths = np.minimum(lengths[source], (index + 1) * PAGE)
        sealed = np.maximum(index - 1, 0) * PAGE
    else:
        first, piece_lengths, sealed = computed[source], lengths[source], np.zeros_like(source)
    starts = queries[:-1][source] + first - computed[source]
    arrays = (queries, lengths, begin, end, source, piece_lengths, sealed)
    return Step(
        *(x.astype(np.int32) for x in arrays),
        spans=_spans(starts, starts + piece_lengths - first, apart=leave is not None),
        left=left,
        sealing=sealing,
        single=bool(single),
        rows=int(queries[-1]),
        most_pages=int(((end - begin) // PAGE).max(initial=0)),
    )


def _spans(starts: np.ndarray, ends: np.ndarray, apart: bool) -> list[Span]:
    """Runs of pieces with rows [starts, ends), split where rows between them are the host's. apart: also where pieces
    of one row meet longer ones, since a device gives every piece of a call the room of the longest."""
    if not len(starts):
        return []
    one = (ends - starts <= 1) & apart
    edges = [0, *(np.flatnonzero((starts[1:] != ends[:-1]) | (one[1:] != one[:-1])) + 1), len(starts)]
    return [
        Span(slice(a, b), slice(int(starts[a]), int(ends[b - 1])), np.append(starts[a:b], ends[b - 1]) - starts[a])
        for a, b in pairwise(edges)
    ]
