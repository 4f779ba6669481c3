"""One layer's cache for mlx-lm, its keys and values in the kv4 core: KV4Cache, and BatchKV4Cache for sequences of
different lengths side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from kv4._core import PAGE_TOKENS
from kv4.messages import mismatch
from kv4.recipe import Recipe
from kv4.shared import total_bytes

from .arrays import DTYPES
from .core import Row, new_core
from .handle import KVHandle

# Steps of one token after which a window moves on, whichever caller took them: a longer draft cannot be undone.
DRAFT_TOKENS = 64


def nbytes(caches: Iterable[Any]) -> int:
    """Bytes of a model's caches, kv4's or mlx-lm's own. What kv4's layers share (tables of a rotation) counts once."""
    cores, others = [], 0
    for cache in caches:
        if isinstance(cache, (KV4Cache, BatchKV4Cache)):
            cores += cache.cores
        else:
            others += cache.nbytes
    return total_bytes(cores) + others


class Unsaveable:
    """A placeholder in `state` for pages: mx.eval ignores it, mlx-lm's save_prompt_cache refuses it with this text."""

    def __repr__(self) -> str:
        return (
            "a kv4 cache, whose packed pages mlx-lm's prompt-cache files have no place for. Expected a cache of "
            "mlx-lm's own; keep a kv4 cache in memory (copy.deepcopy shares its pages)"
        )


class KV4Cache:
    """The 4-bit counterpart of mlx-lm's KVCache and RotatingKVCache, for one attention layer.

        cache = kv4.mlx.make_prompt_cache(model)
        generate(model, tokenizer, prompt, prompt_cache=cache)

    Args:
        recipe: a kv4.Recipe; None means Recipe().
        window: a query sees this many newest tokens, its own included (RotatingKVCache's max_size); 0 = all.
        packed: hand attention KVHandles, which only kv4's scaled_dot_product_attention reads (attach sees to it).
            False hands it dequantised arrays, right for any model, with a dense copy at every step.
        record_past: a window evicts nothing, so that any trim succeeds. Without it the newest tokens of a draft can be
            dropped (can_roll_back), which is all that speculative decoding asks for.
        constants: lambda_k, lambda_v [kv_heads, head_dim], matrix_k, matrix_v [head_dim, head_dim] where the recipe
            asks for them.

    Every sequence of a batch has the same length here; BatchKV4Cache holds ragged ones. `offset` counts the tokens
    taken in. The core is made at the first update, from its shapes and dtype.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        window: int = 0,
        packed: bool = True,
        record_past: bool = False,
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        if recipe is None:
            recipe = Recipe()
        elif not isinstance(recipe, Recipe):
            raise ValueError(mismatch("recipe", "a kv4.Recipe or None", type(recipe).__name__))
        if not isinstance(window, int) or window < 0:
            raise ValueError(mismatch("window", "0 (none) or a positive number of tokens", window))
        self.recipe = recipe
        self.window = window
        self.packed = packed
        self.record_past = record_past
        self.constants = dict(constants or {})
        self.core: Any = None
        self.dtype: mx.Dtype | None = None
        self.offset = 0
        self._before = 0  # offset before the newest update
        self._drafted = 0  # newest tokens that came one by one since the last trim or longer call
        self.version = 0
        self._dims = (0, 0, 0, 0)  # batch, kv_heads, head_dim_k, head_dim_v

    @property
    def cores(self) -> list[Any]:
        return [] if self.core is None else [self.core]

    def new_core(self, keys: mx.array, values: mx.array) -> Any:
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 4:
                raise ValueError(mismatch(name, "an array [batch, kv_heads, tokens, head_dim]", x))
            if x.dtype not in DTYPES:
                raise ValueError(mismatch(name, "float32, float16 or bfloat16", x.dtype))
        return new_core(
            self.recipe,
            dtype=DTYPES[keys.dtype],
            kv_heads=keys.shape[1],
            head_dim_k=keys.shape[3],
            head_dim_v=values.shape[3],
            sliding_window=self.window,
            **self.constants,
        )

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Appends keys [batch, kv_heads, T >= 0, head_dim] and values like them. Errors: ValueError naming the
        argument for another shape or dtype than the cache's; NotImplementedError or ValueError, with the core's
        reason, where the recipe does not serve the head dims, or no kernel of MLX's device does; RuntimeError for a
        device that is none of kv4's. The cache then is as it was."""
        core = self.core if self.core is not None else self.new_core(keys, values)
        if values.dtype != keys.dtype:
            raise ValueError(mismatch("values", f"the keys' dtype {keys.dtype}", values.dtype))
        tokens = keys.shape[2]
        if self.window:
            core.record_past(self.keeps_past(tokens))
        core.append(keys, values)
        self.core = core
        self.count(tokens, keys, values)

    def keeps_past(self, tokens: int) -> bool:
        """Before `tokens` more: whether the window stands still, since what is held before them may end in tokens of a
        draft. A draft model takes its own in one by one; a call of several, in which drafts are checked, follows final
        ones, and so does what comes after a trim."""
        return self.record_past or (tokens <= 1 and 0 < self._drafted <= DRAFT_TOKENS)

    def count(self, tokens: int, keys: mx.array, values: mx.array) -> None:
        """Counts the tokens of such arrays, which the core has appended."""
        self._drafted = self._drafted + 1 if tokens == 1 else 0 if tokens else self._drafted
        self.dtype = keys.dtype
        self._dims = (self.core.batch, keys.shape[1], keys.shape[3], values.shape[3])
        self._before = self.offset
        self.offset += tokens
        self.version += 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """`append`, then the two handles, or with packed=False the dense arrays, that attention is to read."""
        self.append(keys, values)
        if not self.packed:
            return self.keys_and_values()
        own = keys.shape[2] > PAGE_TOKENS
        return KVHandle(self, "keys", keys if own else None), KVHandle(self, "values", values if own else None)

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the newest update_and_fetch returned, for layers that share this cache."""
        if not self.packed:
            return self.dense("keys"), self.dense("values")
        return KVHandle(self, "keys"), KVHandle(self, "values")

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> mx.array | str | None:
        """The mask of a call of N more tokens: None or "causal" wherever the cache's own window says all, else a
        bool array [N, columns]."""
        window = self.window
        asked = window_size if window_size is not None and (not window or window_size < window) else None
        if asked is not None and self.offset + N <= asked:
            asked = None
        if self.packed and asked is None and not return_array:
            return None if N == 1 else "causal"
        before = self.offset - self._first(self.offset) if not self.packed else self.offset
        limit = asked if asked is not None else window
        if N == 1 and not return_array and (not limit or before + 1 <= limit):
            return None
        if not limit and not return_array:
            return "causal"
        return create_causal_mask(N, before, window_size=limit or None)

    def _first(self, length: int) -> int:
        """Position of the first column that a next token may see once `length` tokens are held."""
        return max(0, length - self.window + 1) if self.window else 0

    def shape_of(self, which: str) -> tuple[int, int, int, int]:
        """[batch, kv_heads, columns, head_dim] of the "keys" or the "values" as dense arrays."""
        batch, heads, dim_k, dim_v = self._dims
        return batch, heads, self.offset - self._first(self._before), dim_k if which == "keys" else dim_v

    def dense(self, which: str) -> mx.array:
        """All "keys" or "values" that the newest call's queries may see, dequantised, in the model's dtype: [batch,
        kv_heads, columns, head_dim]."""
        shape = self.shape_of(which)
        return self.core.dense(which == "values", self._first(self._before), shape[2]).astype(self.dtype)

    @property
    def keys(self) -> mx.array | None:
        """All keys that attention may see, dequantised (a copy), or None before the first update."""
        return None if self.core is None else self.dense("keys")

    @property
    def values(self) -> mx.array | None:
        """All values that attention may see, dequantised (a copy), or None before the first update."""
        return None if self.core is None else self.dense("values")

    @property
    def state(self) -> Any:
        """For mx.eval: what may be pending on the GPU. Prompt-cache files are refused, see Unsaveable."""
        return [] if self.core is None else [*self.core.arrays(), Unsaveable()]

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise ValueError(mismatch("state", "nothing (no kv4 cache comes from arrays)", type(value).__name__))

    @property
    def meta_state(self) -> str:
        return ""

    @classmethod
    def from_state(cls, state: Any, *args: Any) -> KV4Cache:
        raise ValueError(mismatch("state", "a cache of mlx-lm's own", "a kv4 cache's, which files do not hold"))

    def size(self) -> int:
        """Tokens that a next query may see."""
        return min(self.offset, self.window) if self.window else self.offset

    def empty(self) -> bool:
        return self.core is None

    def seal(self) -> None:
        """Seals now what the next update would, and frees its memory: for a stored prompt. The only loss: a trim into
        the last call's tokens no longer restores them exactly."""
        if self.core is not None:
            self.core.seal()
            self.version += 1

    @property
    def nbytes(self) -> int:
        """Every byte the core holds for this layer: packed pages with their slack, exact tokens, tables. Tables of its
        rotation are in it that other layers may use as well: kv4.mlx.nbytes(caches) counts them once."""
        return self.core.nbytes() if self.core is not None else 0

    @property
    def max_size(self) -> int | None:
        return self.window or None

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be dropped: not once a window has evicted some (record_past prevents it)."""
        return not self.window or self.core is None or self.core.first == 0

    def can_roll_back(self) -> int:
        """The most that trim() can drop and leave some: tokens whose windows are still held."""
        if self.is_trimmable():
            return self.offset
        return min(self.offset, self.offset - self.window + 1 - self.core.first)

    def trim(self, n: int) -> int:
        """Drops the newest min(n, offset) tokens and returns their number; those left are final. Errors: IndexError
        where a window has evicted what would be needed."""
        n = min(self.offset, int(n))
        if n > 0:
            if n < self.offset:
                self.core.crop(self.offset - n)
            else:
                self.core.reset()
            self.offset -= n
            self._before = min(self._before, self.offset)
            self.version += 1
        self._drafted = 0
        return max(n, 0)

    @classmethod
    def merge(cls, caches: Sequence[KV4Cache]) -> BatchKV4Cache:
        """One ragged cache of single-sequence caches, which stay as they are."""
        return BatchKV4Cache([copy.deepcopy(cache) for cache in caches])

    def __deepcopy__(self, memo: dict[int, Any]) -> KV4Cache:
        """An independent copy; sealed pages are shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.core = self.core.clone() if self.core is not None else None
        return twin

    def __repr__(self) -> str:
        return f"KV4Cache(tokens={self.offset}, window={self.window}, nbytes={self.nbytes})"


class BatchKV4Cache:
    """The counterpart of mlx-lm's BatchKVCache and BatchRotatingKVCache: a KV4Cache of one sequence per row, all in one
    core from the first update on, so that a step is one append and one attend.

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
        self.core: Any = None  # of all rows together
        self.spans: list[tuple[int, int]] = []  # of the newest call: its real tokens per row
        self.tokens = 0  # of the newest call
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
        """Appends each row's real tokens of keys [batch, kv_heads, T, head_dim] and values like them."""
        if keys.ndim != 4 or keys.shape[0] != len(self.rows):
            raise ValueError(mismatch("keys", f"[{len(self.rows)}, kv_heads, tokens, head_dim]", keys))
        tokens = keys.shape[2]
        self._check(keys, values)
        spans = []
        for i in range(len(self.rows)):
            lo = min(self._left[i], tokens)
            spans.append((lo, tokens if self._remaining is None else lo + min(self._remaining[i], tokens - lo)))
        core = self.core
        if core is None:
            core = self.rows[0].new_core(keys, values)
            self._join(core, self)
        if self.rows[0].window:
            core.record_past(any(row.keeps_past(hi - lo) for row, (lo, hi) in zip(self.rows, spans, strict=True)))
        core.append(keys, values, spans)
        self._share(core)
        for i, (row, (lo, hi)) in enumerate(zip(self.rows, spans, strict=True)):
            row.count(hi - lo, keys, values)
            self._left[i] -= lo
            if self._remaining is not None:
                self._remaining[i] -= hi - lo
        self.spans, self.tokens = spans, tokens
        self.offset = self.offset + tokens
        self.version += 1
        return KVHandle(self, "keys", keys), KVHandle(self, "values", values)

    @staticmethod
    def _join(core: Any, batch: BatchKV4Cache) -> None:
        """Appends the sequences of a batch's rows to `core`."""
        if batch.core is not None:
            core.extend(batch.core)
            return
        for row in batch.rows:
            if row.core is None:
                core.add(1)
            else:
                core.extend(row.core)

    def _share(self, core: Any) -> None:
        self.core = core
        if core is not None:
            for i, row in enumerate(self.rows):
                row.core = Row(core, i)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        """Refuses what a row would, before any row is appended to."""
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
        return [self.offset, *(x for core in self.cores for x in core.arrays()), Unsaveable()]

    @property
    def cores(self) -> list[Any]:
        return [row.core for row in self.rows if row.core is not None] if self.core is None else [self.core]

    def size(self) -> int:
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def nbytes(self) -> int:
        return nbytes([self])

    def seal(self) -> None:
        """Seals every row, see KV4Cache.seal."""
        for core in self.cores:
            core.seal()
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
        if self.core is not None:
            self.core.select(keep)
        self.rows = [self.rows[i] for i in keep]
        self._share(self.core if keep else None)
        self._left = [self._left[i] for i in keep]
        if self._remaining is not None:
            self._remaining = [self._remaining[i] for i in keep]
        self.offset = self.offset[mx.array(keep, dtype=mx.int32)]
        self.version += 1

    def extend(self, other: BatchKV4Cache) -> None:
        """Appends the rows of `other`, which must not be used afterwards."""
        if self._remaining is not None or other._remaining is not None:
            raise ValueError(mismatch("other", "caches without right padding under way", "one that is being filled"))
        joined = BatchKV4Cache([*self.rows, *other.rows])
        core = self.core
        if core is None and other.core is not None:
            core = other.core.clone()
            core.reset()
            self._join(core, self)
        if core is not None:
            self._join(core, other)
        self.rows = joined.rows
        self._share(core)
        self._left = [*self._left, *other._left]
        self.offset = mx.concatenate([self.offset, other.offset])
        self.version += 1

    def extract(self, idx: int) -> KV4Cache:
        """Row `idx` as a cache of its own; sealed pages are shared."""
        return copy.deepcopy(self.rows[idx])

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchKV4Cache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        if self.core is None:
            twin.rows = [copy.deepcopy(row, memo) for row in self.rows]
        else:
            twin.rows = [copy.copy(row) for row in self.rows]
            twin._share(self.core.clone())
        twin._left = list(self._left)
        twin._remaining = None if self._remaining is None else list(self._remaining)
        return twin

    def __repr__(self) -> str:
        return f"BatchKV4Cache(tokens={[row.offset for row in self.rows]}, nbytes={self.nbytes})"
