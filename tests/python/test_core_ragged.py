"""The binding: sequences of their own length in one cache."""

import numpy as np
import pytest

from kv4 import Recipe, _core

HEADS, KV_HEADS, DIM = 4, 2, 64


def make(recipe: Recipe) -> _core.Cache:
    return _core.Cache(recipe, kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM)


def draw(heads: int, tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, heads, tokens, DIM)).astype(np.float32)


def states(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(q.shape[:3], np.float32), np.empty(q.shape[:3], np.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """How work is cut among threads depends on all of a call."""
    before = _core.num_threads()
    _core.set_num_threads(1)
    yield
    _core.set_num_threads(before)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.exact()], ids=["kv4", "exact"])
def test_sequences_of_their_own_length_are_answered_as_each_alone(recipe):
    cache = make(recipe)
    cache.add(3)
    alone = [make(recipe) for _ in range(3)]
    for seed, rows in enumerate([[(2, 70), (0, 200)], [(1, 3)], [(0, 1), (1, 1), (2, 1)], [(1, 64), (2, 5)]]):
        parts = [
            [draw(heads, n, 9 * seed + which) for _, n in rows]
            for which, heads in enumerate((KV_HEADS, KV_HEADS, HEADS))
        ]
        k, v, q = (np.concatenate(x, axis=2) for x in parts)
        out = np.empty_like(q)
        start = np.arange(len(rows), dtype=np.int32)
        cache.append(k, v, rows=rows)
        cache.attend(q, out, rows=rows, start=start)
        begin = 0
        for i, (row, n) in enumerate(rows):
            want = np.empty((1, HEADS, n, DIM), np.float32)
            alone[row].append(parts[0][i], parts[1][i])
            alone[row].attend(parts[2][i], want, start=start[i : i + 1])
            np.testing.assert_array_equal(out[:, :, begin : begin + n], want)
            begin += n
    assert cache.lengths == [x.length for x in alone] == [201, 68, 76]
    assert cache.length == 201
    cache.crop(50, row=2)
    assert cache.lengths == [201, 68, 50]
    cache.crop(60)
    assert cache.lengths == [60, 60, 50]
    cache.remove([1])
    cache.add(1)
    assert cache.lengths == [60, 50, 0]


def test_partial_states_of_rows_are_softmaxes_over_the_positions_below_each_ones_own():
    """Exact rows of float32, so that a state in float64 differs by the roundings of its sums alone."""
    cache, lengths, upto, rows = make(Recipe.exact()), [30, 200, 90], [200, 0, 17], [(1, 70), (0, 2), (2, 1)]
    cache.add(3)
    held = [(draw(KV_HEADS, n, 10 + n), draw(KV_HEADS, n, 20 + n)) for n in lengths]
    k, v = (np.concatenate(x, axis=2) for x in zip(*held, strict=True))
    cache.append(k, v, rows=list(enumerate(lengths)))
    total = sum(n for _, n in rows)
    q, o = draw(HEADS, total, 5), np.empty((1, HEADS, total, DIM), np.float32)
    m, weight = np.empty((1, HEADS, total), np.float32), np.empty((1, HEADS, total), np.float32)
    cache.attend_partial(q, o, m, weight, upto=upto, rows=rows, scale=0.125)
    begin = 0
    for (row, n), end in zip(rows, upto, strict=True):
        keys, values = (np.repeat(x[0, :, :end], HEADS // KV_HEADS, 0).astype(np.float64) for x in held[row])
        at = slice(begin, begin + n)
        scores = 0.125 * q[0, :, at].astype(np.float64) @ keys.transpose(0, 2, 1)
        query = lengths[row] - n + np.arange(n)
        scores = np.where(np.arange(end) <= query[:, None], scores, -np.inf)
        top = scores.max(-1, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0)[..., None])
        np.testing.assert_allclose(m[0, :, at], top, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(weight[0, :, at], weights.sum(-1), rtol=1e-4)
        np.testing.assert_allclose(o[0, :, at], weights @ values, rtol=1e-4, atol=1e-3)
        begin += n


@pytest.mark.parametrize("shared", [False, True], ids=["pages of another cache", "pages of a clone"])
def test_sequences_of_another_cache_go_on_here_as_they_would_there(shared):
    cache = make(Recipe())
    x = draw(KV_HEADS, 300, 1)
    cache.append(x, x)
    other = cache.clone() if shared else make(Recipe())
    y = draw(KV_HEADS, 200, 2)
    other.append(y, y)
    cache.extend(other)
    assert cache.lengths == [300, other.length]
    q, new = draw(HEADS, 1, 3), draw(KV_HEADS, 1, 4)
    outs = [np.empty((1, HEADS, 1, DIM), np.float32) for _ in range(2)]
    for each, out, rows in ((cache, outs[0], [(1, 1)]), (other, outs[1], None)):
        each.append(new, new, rows=rows)
        each.attend(q, out, rows=rows)
    np.testing.assert_array_equal(*outs)
    with pytest.raises(ValueError, match="^recipe.seal: expected page; got never"):
        cache.extend(make(Recipe.exact()))


def test_erased_positions_are_gone_and_those_behind_move_up():
    cache, want = make(Recipe()), make(Recipe())
    k, v, q = draw(KV_HEADS, 60, 1), draw(KV_HEADS, 60, 2), draw(HEADS, 1, 3)
    cache.append(k, v)
    cache.erase(0, 10, 25)
    kept = np.r_[0:10, 35:60]
    want.append(np.ascontiguousarray(k[:, :, kept]), np.ascontiguousarray(v[:, :, kept]))
    outs = [np.empty((1, HEADS, 1, DIM), np.float32) for _ in range(2)]
    for each, out in zip((cache, want), outs, strict=True):
        each.attend(q, out)
    assert cache.length == 35
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
    "call, kind, begins",
    [
        (lambda c, x: c.append(x, x, rows=[(2, 4)]), IndexError, "rows: expected indices from 0 to 1; got 2"),
        (
            lambda c, x: c.append(x, x, rows=[(0, 2), (0, 2)]),
            ValueError,
            "rows: expected each sequence once; got 0 twice",
        ),
        (lambda c, x: c.append(x, x, rows=[(0, 3)]), ValueError, "rows: expected as many tokens in all as k, 4; got 3"),
        (
            lambda c, x: c.attend(x, np.empty_like(x), rows=[(0, 1), (1, 3)], start=np.zeros(1, np.int32)),
            ValueError,
            "start: ",
        ),
        (
            lambda c, x: c.attend(x, np.empty_like(x), rows=[(0, 4)]),
            IndexError,
            "rows: expected 1 to 3 queries of sequence 0; got 4",
        ),
        (
            lambda c, x: c.attend_partial(x, np.empty_like(x), *states(x), upto=[3], rows=[(0, 1), (1, 3)]),
            ValueError,
            "upto: expected 2 positions, one for each of rows; got 1",
        ),
        (
            lambda c, x: c.attend_partial(x, np.empty_like(x), *states(x), upto=[4, 8], rows=[(0, 1), (1, 3)]),
            IndexError,
            "upto: expected 0 to 3; got 4",
        ),
        (
            lambda c, x: c.attend_partial(x, np.empty_like(x), *states(x), upto=[3, 8]),
            ValueError,
            "upto: expected one position, where no rows are named; got 2",
        ),
        (lambda c, x: c.crop(9, row=1), IndexError, "length: expected 0 to 8; got 9"),
        (lambda c, x: c.crop(1, row=-1), IndexError, "rows: "),
        (lambda c, x: c.erase(0, 2, 2), IndexError, "first, count: expected positions within 0 to 3; got 2, 2"),
        (lambda c, x: c.remove([1, 1]), ValueError, "rows: expected each sequence once; got 1 twice"),
        (lambda c, x: c.add(-1), ValueError, "count: "),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(call, kind, begins):
    cache = make(Recipe())
    cache.add(2)
    x = draw(KV_HEADS, 11, 5)
    cache.append(x, x, rows=[(0, 3), (1, 8)])
    saved, version = [], cache.version
    cache.save(lambda block: saved.append(bytes(block)))
    with pytest.raises(kind) as caught:
        call(cache, draw(KV_HEADS, 4, 6))
    assert str(caught.value).startswith(begins)
    again = []
    cache.save(lambda block: again.append(bytes(block)))
    assert (again, cache.version, cache.lengths) == (saved, version, [3, 8])
