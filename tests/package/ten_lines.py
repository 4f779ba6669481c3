"""What a new user's first ten lines do, with numpy alone: tokens into a cache, and an answer that is softmax over what
the cache holds."""

import numpy as np

import kv4

rng = np.random.default_rng(0)
k, v, q = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 2, 300, 64), (1, 2, 300, 64), (1, 8, 1, 64)))
cache = kv4.Cache(kv4.Recipe(), kv_heads=2, head_dim_k=64, head_dim_v=64)
cache.append(k, v)
cache.seal()
out = np.empty_like(q)
cache.attend(q, out)
held_k, held_v = np.empty_like(k), np.empty_like(v)
cache.dense_keys(0, 300, held_k)
cache.dense_values(0, 300, held_v)

scores = np.einsum("bhqd,bhtd->bhqt", q, np.repeat(held_k, 4, axis=1)) / 8
p = np.exp(scores - scores.max(-1, keepdims=True))
want = p / p.sum(-1, keepdims=True) @ np.repeat(held_v, 4, axis=1)
assert np.abs(out - want).max() <= 1e-3 * np.abs(want).max(), (out, want)
assert not np.array_equal(held_k, k), "tokens are sealed"
print(f"kv4 {kv4.__version__}: {cache.nbytes()} bytes for 300 tokens, {k.nbytes + v.nbytes} in float32")
