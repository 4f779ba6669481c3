"""KV4Cache: one layer's cache for mlx-lm, its keys and values in the kv4 core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from kv4.messages import mismatch
from kv4.recipe import Recipe
from kv4.shared import total_bytes

from .arrays import DTYPES
from .core import new_core
from .handle import KVHandle
from .prefill import own_attention, own_state

PAGE_TOKENS = 64
# Steps of one token after which a window moves on, whoever took them: a longer draft cannot be undone.
DRAFT_TOKENS = 64


def nbytes(caches: Iterable[Any]) -> int:
    """Bytes of a model's caches, kv4's or mlx-lm's own. What kv4's layers share (tables of a rotation) counts once."""
    cores, others = [], 0
    for cache in caches:
        rows = getattr(cache, "rows", [cache])  # of a batch
        if all(isinstance(row, KV4Cache) for row in rows):
            cores += [row.core for row in rows if row.core is not None]
        else:
            others += cache.nbytes
    return total_bytes(cores) + others


class Unsaveable:
    """Stands in `state` for pages: mx.eval passes over it, mlx-lm's save_prompt_cache refuses it with this text."""

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

    def _new_core(self, keys: mx.array, values: mx.array) -> Any:
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 4:
                raise ValueError(mismatch(name, "an array [batch, kv_heads, tokens, head_dim]", list(x.shape)))
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
        """Takes in keys [batch, kv_heads, T >= 0, head_dim] and values like them. Errors: ValueError naming the
        argument for another shape or dtype than the cache's; NotImplementedError or ValueError, with the core's
        reason, where the recipe does not serve the head dims, or no kernel of MLX's device does; RuntimeError for a
        device that is none of kv4's. The cache then is as it was."""
        core = self.core if self.core is not None else self._new_core(keys, values)
        if values.dtype != keys.dtype:
            raise ValueError(mismatch("values", f"the keys' dtype {keys.dtype}", values.dtype))
        tokens = keys.shape[2]
        if self.window:
            core.record_past(self.record_past or self._may_be_undone(tokens))
        core.append(keys, values)
        self.core = core
        self._drafted = self._drafted + 1 if tokens == 1 else 0 if tokens else self._drafted
        self.dtype = keys.dtype
        self._dims = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        self._before = self.offset
        self.offset += tokens
        self.version += 1

    def _may_be_undone(self, tokens: int) -> bool:
        """Whether what is held before a call of `tokens` may end in tokens of a draft. A draft model takes its own in
        one by one; a call of several, in which drafts are checked, follows final ones, and so does what comes after a
        trim."""
        return tokens <= 1 and 0 < self._drafted <= DRAFT_TOKENS

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

    # Attention.

    def attend(
        self,
        queries: mx.array,
        own_k: mx.array | None,
        own_v: mx.array | None,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """See kv4.mlx.scaled_dot_product_attention; own_k, own_v: the call's own exact keys and values, where long."""
        if queries.ndim != 4:
            raise ValueError(mismatch("queries", "[batch, q_heads, tokens, head_dim]", list(queries.shape)))
        if isinstance(mask, str) and mask != "causal":
            raise ValueError(mismatch("mask", '"causal", an array or None', repr(mask)))
        batch, heads, tokens, _ = queries.shape
        if not tokens:
            return mx.zeros((batch, heads, 0, self._dims[3]), queries.dtype)
        if self._long(queries, own_k, own_v, mask):
            out = self._attend_long(queries, own_k, own_v, scale, sinks)
            if out is not None:
                return out.astype(queries.dtype)
        options: dict[str, Any] = {"scale": scale}
        if sinks is not None:
            options["sinks"] = sinks.astype(mx.float32).reshape(-1)
        if isinstance(mask, mx.array):
            options |= self._general(mask)
        elif mask is None and tokens > 1:
            options["causal"] = False
        return self.core.attend(queries, **options)

    def _general(self, mask: mx.array) -> dict[str, Any]:
        """Core arguments of a mask [..., T or 1, columns]."""
        if mask.ndim > 4 or mask.ndim < 1:
            raise ValueError(mismatch("mask", "1 to 4 axes [batch, q_heads, tokens, columns]", list(mask.shape)))
        columns = mask.shape[-1]
        if columns > self.offset:
            raise ValueError(mismatch("mask", f"at most {self.offset} columns, the tokens in the cache", columns))
        full = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if full.dtype != mx.bool_:
            if full.dtype not in DTYPES:
                raise ValueError(mismatch("mask", "bool, float32, float16 or bfloat16", full.dtype))
            full = full.astype(mx.float32)
        return {"causal": False, "offset": self.offset - columns, "mask": full}

    def _long(self, q: mx.array, k: mx.array | None, v: mx.array | None, mask: Any) -> bool:
        """True where MLX's own kernels may answer for the call's own tokens."""
        return (
            k is not None
            and v is not None
            and isinstance(mask, str)
            and self.recipe.seal != "arrival"
            and k.shape[-1] == v.shape[-1] == q.shape[-1]
            and q.dtype == k.dtype
            and q.shape[2] == k.shape[2]
            and q.shape[0] == k.shape[0]
            and q.shape[1] % k.shape[1] == 0
        )

    def _attend_long(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array | None:
        """None where a value is not finite: the core refuses that by name."""
        if self.core.tells_non_finite and not all(bool(mx.isfinite(x).all().item()) for x in (q, k, v)):
            return None
        before = self.offset - q.shape[2]
        if before == 0:
            if self.recipe.seal == "page":
                self.core.partial(q, 0, scale)  # records the queries, from which lambda is learned
            return own_attention(q, k, v, scale, self.window, sinks)
        own = own_state(q, k, v, scale, self.window)
        return own.merge(self.core.partial(q, before, scale)).finish(sinks)

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

    # What is held.

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
        """Seals now what the next update would, and returns its memory: for a prompt that is kept aside. Given up is
        one thing: a trim into the last call's tokens no longer restores them exactly."""
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

    # Trimming and batches.

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
    def merge(cls, caches: Sequence[KV4Cache]) -> Any:
        """One ragged cache of single-sequence caches, which stay as they are."""
        from .batch import BatchKV4Cache

        return BatchKV4Cache.merge(caches)

    def __deepcopy__(self, memo: dict[int, Any]) -> KV4Cache:
        """A cache that goes its own way; sealed pages are shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.core = self.core.clone() if self.core is not None else None
        return twin

    def __repr__(self) -> str:
        return f"KV4Cache(tokens={self.offset}, window={self.window}, nbytes={self.nbytes})"
