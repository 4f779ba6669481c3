"""What a step asks of kv4, and its arrays where captured graphs read them: no engine, no model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from kv4.vllm.backend import Arrays
from kv4.vllm.steps import LONG, PAGE, plan


def batch(computed: list[int], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative rows and lengths of sequences that have so many tokens and get so many more."""
    queries = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return queries, np.add(computed, counts).astype(np.int32)


def random_batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n = int(random.integers(1, 7))
    computed = random.choice([0, 0, 1, 63, 64, 65, 127, 128, 700], n)
    return batch(computed.tolist(), random.choice([0, 1, 1, 2, 63, 64, 65, 300, 1100], n).tolist())


@pytest.mark.parametrize("leave", [None, LONG, 1024])
@pytest.mark.parametrize("seed", range(40))
def test_pieces_and_what_the_host_attends_to_cover_each_row_once(seed: int, leave: int | None) -> None:
    queries, lengths = random_batch(np.random.default_rng(seed))
    step = plan(queries, lengths, sealing=True, leave=leave)
    counts = np.diff(queries)
    covered = np.zeros(queries[-1], np.int64)
    for b in np.flatnonzero(step.left):
        assert leave and (counts[b] == lengths[b] > 1 or counts[b] >= leave)
        covered[queries[b] : queries[b + 1]] += 1
    for a, b in pairwise(step.spans):
        assert a.rows.stop < b.rows.start or (leave and a.rows.stop == b.rows.start)
    for span in step.spans:
        pieces = range(span.pieces.start, span.pieces.stop)
        for first, last, p in zip(span.queries[:-1], span.queries[1:], pieces, strict=True):
            rows = slice(span.rows.start + first, span.rows.start + last)
            covered[rows] += 1
            b, rows_before = step.source[p], rows.stop - queries[step.source[p]]
            assert queries[b] <= rows.start and rows.stop <= queries[b + 1]
            if last == first:
                continue
            # Its newest row is where the piece ends; its rows lie in one page, and read the page before exactly.
            newest = step.piece_lengths[p] - 1
            assert newest == lengths[b] - counts[b] + rows_before - 1
            assert (newest - (last - first - 1)) // PAGE == newest // PAGE
            assert step.piece_sealed[p] == max(newest // PAGE - 1, 0) * PAGE
    assert (covered == 1).all()


def test_one_token_each_leaves_arrays_where_they_are() -> None:
    arrays = Arrays(8, torch.device("cpu"), leave=None)
    places = None
    for computed in ([63, 5, 640], [64, 6, 641], [127, 63, 64, 0]):
        # The last row is padding, as a graph of four has it where three sequences run.
        counts = [1] * len(computed) + [0]
        queries, lengths = batch([*computed, 0], counts)
        step, tensors = arrays.of(queries, lengths, sealing=True)
        assert step.single and len(step.spans) == 1
        for name in ("lengths", "begin", "end", "piece_sealed", "queries"):
            assert tensors[name].tolist() == getattr(step, name).tolist(), name
        assert tensors["piece_lengths"].tolist() == lengths.tolist()
        assert tensors["span0"].tolist() == step.spans[0].queries.tolist() == queries.tolist()
        assert tensors["zeros"].tolist() == [0] * len(lengths)
        begins = {name: x.data_ptr() for name, x in tensors.items()}
        assert places in (None, begins)
        places = begins
    assert step.begin.tolist() == [64, 0, 64, 0, 0] and step.end.tolist() == [128, 64, 64, 0, 0]


def test_groups_of_blocks_that_ask_for_the_same_step_get_the_same_arrays() -> None:
    arrays = Arrays(8, torch.device("cpu"), leave=None)
    queries, lengths = batch([0, 100], [70, 1])
    first = arrays.of(queries, lengths, sealing=True)
    assert arrays.of(queries.copy(), lengths.copy(), sealing=True)[0] is first[0]
    assert arrays.of(queries, lengths + 1, sealing=True)[0] is not first[0]
    assert arrays.of(queries, lengths + 1, sealing=False)[0].most_pages == 0
