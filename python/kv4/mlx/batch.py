"""BatchKV4Cache: sequences of different lengths side by side, for mlx-lm's batch generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kv4.messages import mismatch

from . import core
from .cache import PAGE_TOKENS, KV4Cache, Unsaveable, nbytes
from .handle import KVHandle


class BatchKV4Cache:
    """The counterpart of mlx-lm's BatchKVCache and BatchRotatingKVCache: one KV4Cache of one sequence per row.

    Padding, left or right, is never taken in: it reaches no page, and a row holds what the sequence alone would. A
    query row of padding is answered with 0. `offset` is int32 [batch], the position of each row's next column, counted
    as mlx-lm does: negative while left padding is to come.

    Errors: ValueError for rows that are no single-sequence KV4Caches or that differ in recipe or window.
    """

    def __init__(self, rows: Sequence[KV4Cache], left_padding: Sequence[int] | None = None) -> None:
        self.rows = list(rows)
        for i, row in enumerate(self.rows):
            if not isinstance(row, KV4Cache) or not row.packed or (row.core is not None and row.core.batch != 1):
                raise ValueError(mismatch(f"rows[{i}]", "a packed KV4Cache of one sequence", repr(row)))
            if row.recipe != self.rows[0].recipe or row.window != self.rows[0].window:
                raise ValueError(mismatch(f"rows[{i}]", "the recipe and window of rows[0]", repr(row)))
        self.version = 0
        self._left = list(left_padding) if left_padding is not None else [0] * len(self.rows)
        if len(self._left) != len(self.rows):
            raise ValueError(mismatch("left_padding", f"one entry per row ({len(self.rows)})", len(self._left)))
        self._remaining: list[int] | None = None  # tokens before right padding begins
        self._spans: list[tuple[int, int]] = []  # of the newest call: its real tokens per row
        self._tokens = 0
        self._settle()

    def _settle(self) -> None:
        self.offset = mx.array([row.offset - left for row, left in zip(self.rows, self._left, strict=True)])

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announces padding of the tokens to come: `left_padding` before them, or of each row's tokens only the first
        `lengths` are real. Errors: ValueError for left padding of a row that holds tokens, or right padding alone."""
        if left_padding is not None:
            if any(row.offset for row in self.rows):
                raise ValueError(mismatch("left_padding", "an empty cache", "one that holds tokens"))
            self._left = [a + int(b) for a, b in zip(self._left, left_padding, strict=True)]
            self._settle()
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError(mismatch("lengths", "the real tokens of each row beside right_padding", None))
            self._remaining = [int(n) for n in lengths]

    def finalize(self) -> None:
        """Ends right padding: every row goes on where its own tokens ended."""
        if self._remaining is not None:
            self._remaining = None
            self._settle()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVHandle, KVHandle]:
        """Takes in each row's real tokens of keys [batch, kv_heads, T, head_dim] and values like them."""
        if keys.ndim != 4 or keys.shape[0] != len(self.rows):
            raise ValueError(mismatch("keys", f"[{len(self.rows)}, kv_heads, tokens, head_dim]", list(keys.shape)))
        tokens = keys.shape[2]
        self._check(keys, values)
        if not core.on_gpu():
            mx.eval(keys, values)
        self._spans = []
        for i, row in enumerate(self.rows):
            lo = min(self._left[i], tokens)
            hi = tokens if self._remaining is None else lo + min(self._remaining[i], tokens - lo)
            row.append(keys[i : i + 1, :, lo:hi], values[i : i + 1, :, lo:hi])
            self._left[i] -= lo
            if self._remaining is not None:
                self._remaining[i] -= hi - lo
            self._spans.append((lo, hi))
        self._tokens = tokens
        self.offset = self.offset + tokens
        self.version += 1
        return KVHandle(self, "keys", keys), KVHandle(self, "values", values)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        """Refuses what a row would, before any row takes something in."""
        for row in self.rows:
            if row.core is None:
                continue
            for name, x in (("keys", keys), ("values", values)):
                shape = row.shape_of(name)
                expected = (len(self.rows), shape[1], keys.shape[2], shape[3])
                if x.dtype != row.dtype or x.shape != expected:
                    raise ValueError(mismatch(name, f"{row.dtype} {list(expected)}", f"{x.dtype} {list(x.shape)}"))

    def keys_and_values(self) -> tuple[KVHandle, KVHandle]:
        return KVHandle(self, "keys"), KVHandle(self, "values")

    def attend(
        self,
        queries: mx.array,
        own_k: mx.array | None,
        own_v: mx.array | None,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """See kv4.mlx.scaled_dot_product_attention; the mask is the rows' own."""
        if isinstance(mask, mx.array):
            raise ValueError(mismatch("mask", 'None or "causal" (padding is the cache\'s own matter)', "an array"))
        if queries.ndim != 4 or queries.shape[0] != len(self.rows) or queries.shape[2] != self._tokens:
            expected = f"[{len(self.rows)}, q_heads, {self._tokens}, head_dim], those of the newest update"
            raise ValueError(mismatch("queries", expected, list(queries.shape)))
        heads, tokens, dim = queries.shape[1], queries.shape[2], self.shape_of("values")[3]
        if not core.on_gpu():
            mx.eval(queries)
        outputs = []
        for i, (row, (lo, hi)) in enumerate(zip(self.rows, self._spans, strict=True)):
            parts = [mx.zeros((1, heads, n, dim), queries.dtype) for n in (lo, tokens - hi)]
            if hi > lo:
                long = own_k is not None and own_v is not None and hi - lo > PAGE_TOKENS
                own = [x[i : i + 1, :, lo:hi] if long else None for x in (own_k, own_v)]
                parts.insert(1, row.attend(queries[i : i + 1, :, lo:hi], *own, scale, "causal", sinks))
            outputs.append(mx.concatenate(parts, axis=2))
        return mx.concatenate(outputs, axis=0)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> str | None:
        """None or "causal". Errors: ValueError where an array or a narrower window than the cache's is asked for."""
        window = self.rows[0].window if self.rows else 0
        narrower = window_size is not None and (not window or window_size < window)
        if return_array or (narrower and self.size() + N > window_size):
            raise ValueError(
                mismatch(
                    "mask",
                    "a model whose layers each keep to their cache's window, as a batch of a kv4 cache needs",
                    f"window_size={window_size}, return_array={return_array}, of a cache with window {window}",
                )
            )
        return None if N == 1 else "causal"

    def shape_of(self, which: str) -> tuple[int, int, int, int]:
        shapes = [row.shape_of(which) for row in self.rows if row.core is not None]
        if not shapes:
            return len(self.rows), 0, 0, 0
        return len(self.rows), shapes[0][1], max(s[2] for s in shapes), shapes[0][3]

    def dense(self, which: str) -> mx.array:
        """Every row's "keys" or "values", dequantised, padded with 0 on the left: [batch, kv_heads, columns, dim]."""
        columns = self.shape_of(which)[2]
        rows = [row.dense(which) for row in self.rows]
        return mx.concatenate([mx.pad(x, [(0, 0), (0, 0), (columns - x.shape[2], 0), (0, 0)]) for x in rows], axis=0)

    @property
    def dtype(self) -> mx.Dtype | None:
        return next((row.dtype for row in self.rows if row.dtype is not None), None)

    @property
    def left_padding(self) -> mx.array:
        """int32 [batch]: columns of each row, as mlx-lm counts them, that hold nothing."""
        longest = max((row.offset for row in self.rows), default=0)
        return mx.array([longest - row.offset for row in self.rows])

    @property
    def state(self) -> Any:
        if self.empty():
            return [self.offset]
        return [self.offset, *(x for row in self.rows if row.core is not None for x in row.core.arrays()), Unsaveable()]

    def size(self) -> int:
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def nbytes(self) -> int:
        return nbytes(self.rows)

    def seal(self) -> None:
        """Seals every row, see KV4Cache.seal."""
        for row in self.rows:
            row.seal()
        self.version += 1

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Drops the newest n tokens of every row, at most what the shortest row holds; returns their number. Errors:
        IndexError where a row's window has evicted what would be needed; all rows are then as they were."""
        n = min([int(n), *(row.offset for row in self.rows)])
        for i, row in enumerate(self.rows):
            if row.can_roll_back() < n < row.offset:
                raise IndexError(mismatch("n", f"at most {row.can_roll_back()}, what row {i} can drop", n))
        for row in self.rows:
            row.trim(n)
        self._settle()
        self.version += 1
        return n

    def filter(self, batch_indices: Any) -> None:
        """Keeps the rows of these indices, in their order."""
        keep = batch_indices.tolist() if isinstance(batch_indices, mx.array) else [int(i) for i in batch_indices]
        self.rows = [self.rows[i] for i in keep]
        self._left = [self._left[i] for i in keep]
        if self._remaining is not None:
            self._remaining = [self._remaining[i] for i in keep]
        self.offset = self.offset[mx.array(keep, dtype=mx.int32)]
        self.version += 1

    def extend(self, other: BatchKV4Cache) -> None:
        """Takes in the rows of `other`, which is not to be used any more."""
        if self._remaining is not None or other._remaining is not None:
            raise ValueError(mismatch("other", "caches without right padding under way", "one that is being filled"))
        joined = BatchKV4Cache([*self.rows, *other.rows])
        self.rows = joined.rows
        self._left = [*self._left, *other._left]
        self.offset = mx.concatenate([self.offset, other.offset])
        self.version += 1

    def extract(self, idx: int) -> KV4Cache:
        """Row `idx` as a cache of its own; sealed pages are shared."""
        return copy.deepcopy(self.rows[idx])

    @classmethod
    def merge(cls, caches: Sequence[KV4Cache]) -> BatchKV4Cache:
        return cls([copy.deepcopy(cache) for cache in caches])

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchKV4Cache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.rows = [copy.deepcopy(row, memo) for row in self.rows]
        twin._left = list(self._left)
        twin._remaining = None if self._remaining is None else list(self._remaining)
        return twin

    def __repr__(self) -> str:
        return f"BatchKV4Cache(tokens={[row.offset for row in self.rows]}, nbytes={self.nbytes})"
