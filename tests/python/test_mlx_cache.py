"""kv4.mlx's caches and what attach does to a model."""

from __future__ import annotations

import copy

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="kv4.mlx needs mlx and mlx-lm (pip install kv4[mlx])", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="kv4.mlx needs mlx-lm (pip install kv4[mlx])", exc_type=ImportError)

import mlx_lm.models.llama as llama  # noqa: E402
from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402

import kv4.mlx  # noqa: E402
from kv4 import Recipe, Side, _core  # noqa: E402
from kv4.mlx import BatchKV4Cache, KV4Cache, scaled_dot_product_attention, speculation  # noqa: E402
from kv4.mlx.arrays import byte_view  # noqa: E402
from mlx_cases import WINDOW, greedy, model_of, prompt_of  # noqa: E402

SCALE = 32**-0.5


def rows(tokens: int, heads: int = 2, batch: int = 1, seed: int = 0, dtype=mx.float32, dim: int = 32) -> mx.array:
    return mx.random.normal((batch, heads, tokens, dim), key=mx.random.key(seed)).astype(dtype)


def filled(tokens: int, **options) -> KV4Cache:
    cache = KV4Cache(**options)
    cache.update_and_fetch(rows(tokens), rows(tokens, seed=1))
    return cache


def attend(cache, q, k, v, mask="causal", sinks=None):
    return scaled_dot_product_attention(q, k, v, cache=cache, scale=SCALE, mask=mask, sinks=sinks)


# Attention through the function that models call.


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "channels apart"])
def test_every_layout_and_dtype_is_read_in_place(dtype, layout):
    k, v, q = rows(20, dtype=dtype), rows(20, seed=1, dtype=dtype), rows(20, 4, seed=2, dtype=dtype)
    expected = mx.fast.scaled_dot_product_attention(
        *(x.astype(mx.float32) for x in (q, k, v)), scale=SCALE, mask="causal"
    )
    axes = {"rows": (0, 1, 2, 3), "transposed": (0, 2, 1, 3), "channels apart": (0, 1, 3, 2)}[layout]
    k, v, q = (mx.contiguous(x.transpose(axes)).transpose(axes) for x in (k, v, q))
    cache = KV4Cache(Recipe.exact())
    out = attend(cache, q, *cache.update_and_fetch(k, v))
    assert out.dtype == dtype and out.shape == (1, 4, 20, 32)
    ulp = {mx.float32: 2.0**-20, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[dtype]
    assert float(mx.abs(out.astype(mx.float32) - expected).max()) <= ulp * float(mx.abs(expected).max())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_core_reads_arrays_through_the_buffer_protocol_too(dtype):
    """As MLX with Metal does it: its DLPack reports the memory as the GPU's."""
    k, v = (mx.contiguous(rows(9, seed=s, dtype=dtype).transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for s in (0, 1))
    mx.eval(k, v)
    out = []
    for view in (lambda x: x, byte_view):
        core = _core.Cache(Recipe.exact(), dtype=str(dtype).split(".")[-1], kv_heads=2, head_dim_k=32, head_dim_v=32)
        core.append(view(k), view(v))
        keys = np.empty((1, 2, 9, 32), np.float32)
        core.dense_keys(0, 9, keys)
        out.append(keys)
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], np.array(k.astype(mx.float32)))


@pytest.mark.parametrize("shape", [(20, 30), (1, 30), (1, 1, 20, 30), (1, 4, 20, 30), (4, 20, 30)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_array_masks(shape, kind):
    cache = KV4Cache(Recipe.exact())
    cache.update_and_fetch(rows(10, seed=3), rows(10, seed=4))
    k, v, q = rows(20), rows(20, seed=1), rows(20, 4, seed=2)
    handles = cache.update_and_fetch(k, v)
    mask = mx.random.uniform(shape=shape, key=mx.random.key(7))
    mask = (mask > 0.4) if kind == "bool" else mask
    if kind == "bool":
        mask = mask | (mx.arange(30) == 3)  # no row sees nothing
    keys, values = (mx.concatenate(x, axis=2) for x in ((rows(10, seed=3), k), (rows(10, seed=4), v)))
    expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE, mask=mask)
    assert mx.allclose(attend(cache, q, *handles, mask=mask), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 90])
@pytest.mark.parametrize("before", [0, 40])
def test_sinks(tokens, before):
    sinks = mx.array([0.5, -1.0, 2.0, 4.0])
    ours, own = KV4Cache(Recipe.exact()), stock.KVCache()
    for cache in (ours, own):
        if before:
            cache.update_and_fetch(rows(before, seed=5), rows(before, seed=6))
    q = rows(tokens, 4, seed=2)
    out = attend(ours, q, *ours.update_and_fetch(rows(tokens), rows(tokens, seed=1)), sinks=sinks)
    expected = attend(own, q, *own.update_and_fetch(rows(tokens), rows(tokens, seed=1)), sinks=sinks)
    assert mx.allclose(out, expected, atol=1e-5)


def test_no_mask_over_several_queries_sees_everything():
    cache = KV4Cache(Recipe.exact())
    k, v, q = rows(20), rows(20, seed=1), rows(20, 4, seed=2)
    out = attend(cache, q, *cache.update_and_fetch(k, v), mask=None)
    assert mx.allclose(out, mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE), atol=1e-5)


def test_other_caches_and_dense_arrays_pass_through():
    k, v, q = rows(20), rows(20, seed=1), rows(20, 4, seed=2)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")
    assert mx.array_equal(attend(None, q, k, v), expected)
    quantised = stock.QuantizedKVCache(group_size=32, bits=8)
    assert mx.allclose(attend(quantised, q, *quantised.update_and_fetch(k, v)), expected, atol=0.1)


# What is refused, and leaves the cache as it was.


def test_errors_name_the_argument():
    cache = filled(10)
    k, v = cache.keys_and_values()
    q = rows(1, 4)
    for call, match in (
        (lambda: cache.update_and_fetch(rows(3, dtype=mx.float16), rows(3, dtype=mx.float16)), "^k: expected dtype"),
        (lambda: cache.update_and_fetch(rows(3), rows(3, dtype=mx.float16)), "^values: expected the keys' dtype"),
        (lambda: cache.update_and_fetch(rows(3, 4), rows(3, 4)), "^k: expected shape"),
        (lambda: KV4Cache().update_and_fetch(rows(3)[0], rows(3)), "^keys: expected an array"),
        (lambda: KV4Cache().update_and_fetch(rows(3).astype(mx.int32), rows(3)), "^keys: expected float32"),
        (lambda: attend(cache, q[0], k, v), "^queries: expected"),
        (lambda: attend(cache, q, k, v, mask="full"), "^mask: expected"),
        (lambda: attend(cache, q, k, v, mask=mx.ones((1, 11), dtype=mx.bool_)), "^mask: expected at most 10 columns"),
        (lambda: attend(cache, q, k, v, mask=mx.ones((1, 10), dtype=mx.int32)), "^mask: expected bool"),
        (lambda: attend(cache, q, k, filled(10).keys_and_values()[1]), "^values: expected the handle of the same"),
        (lambda: KV4Cache("int4"), "^recipe: expected"),
        (lambda: KV4Cache(window=-1), "^window: expected"),
        (lambda: setattr(cache, "state", [q]), "^state: expected nothing"),
        (lambda: KV4Cache.from_state([q]), "^state: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert cache.offset == 10 and cache.core.length == 10


def test_head_dims_that_no_kernel_serves_are_refused_with_the_reason():
    cache = KV4Cache()
    with pytest.raises((ValueError, NotImplementedError), match="31"):
        cache.update_and_fetch(rows(3, dim=31), rows(3, dim=31))
    assert cache.empty() and cache.offset == 0


@pytest.mark.parametrize("tokens", [5, 90])
def test_nan_that_a_query_sees_is_refused_by_name(tokens):
    cache = KV4Cache(Recipe.exact())
    k = np.array(rows(tokens))
    k[0, 1, 2, 3] = np.nan
    handles = cache.update_and_fetch(mx.array(k), rows(tokens, seed=1))
    with pytest.raises(ValueError, match="k: expected finite values"):
        attend(cache, rows(tokens, 4, seed=2), *handles)


def test_a_stale_handle_raises():
    cache = filled(10)
    k, v = cache.keys_and_values()
    cache.update_and_fetch(rows(1), rows(1))
    with pytest.raises(RuntimeError, match="stale handle"):
        attend(cache, rows(1, 4), k, v)
    with pytest.raises(RuntimeError, match="stale handle"):
        k.dense()


def test_prompt_cache_files_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="packed pages mlx-lm's prompt-cache files have no place for"):
        stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), [filled(10)])
    assert not list(tmp_path.iterdir())
    mx.eval([c.state for c in (filled(10), KV4Cache())])  # as generate() does


# The cache itself.


def test_handles_become_dense_arrays_for_anybody_else():
    cache = KV4Cache(Recipe.exact())
    k, v = cache.update_and_fetch(rows(10), rows(10, seed=1))
    assert k.shape == (1, 2, 10, 32) and k.dtype == mx.float32 and k.ndim == 4
    assert mx.array_equal(mx.array(k), rows(10))
    assert mx.array_equal(v[:, :1], rows(10, seed=1)[:, :1])
    assert mx.array_equal(k * 2, rows(10) * 2) and mx.array_equal(k + v, rows(10) + rows(10, seed=1))
    assert mx.array_equal(k.swapaxes(-1, -2), rows(10).swapaxes(-1, -2))
    with pytest.raises(TypeError):
        mx.fast.scaled_dot_product_attention(rows(1, 4), k, v, scale=1.0)


def test_trim():
    cache = filled(300)
    assert cache.is_trimmable() and cache.trim(100) == 100 and cache.offset == 200 == cache.core.length
    assert cache.trim(1000) == 200 and cache.trim(0) == 0 and cache.offset == 0
    windowed = filled(WINDOW + 100, window=WINDOW)
    windowed.update_and_fetch(rows(1), rows(1))
    assert not windowed.is_trimmable()
    assert filled(WINDOW - 1, window=WINDOW).is_trimmable()
    recording = filled(WINDOW + 100, window=WINDOW, record_past=True)
    assert recording.is_trimmable() and recording.trim(90) == 90
    assert windowed.trim(windowed.offset) == WINDOW + 101 and windowed.offset == 0 and windowed.is_trimmable()


@pytest.mark.parametrize("recipe", [Recipe.exact(), Recipe()], ids=["exact", "default"])
def test_a_window_keeps_what_a_draft_may_take_back_and_moves_on(recipe):
    def step(cache, tokens=1):
        attend(cache, rows(tokens, 4), *cache.update_and_fetch(rows(tokens), rows(tokens, seed=1)))

    cache = KV4Cache(recipe, window=WINDOW)
    step(cache, 200)
    for _ in range(5):
        for _ in range(40):  # a draft, token by token, of which the first is right
            step(cache)
        assert cache.can_roll_back() >= 39 and cache.trim(39) == 39
    assert cache.offset == 205
    for _ in range(400):  # no draft: nobody takes that much back
        step(cache)
        assert cache.offset - cache.core.first < WINDOW + 64 + 64
    assert cache.can_roll_back() <= 64 and not cache.is_trimmable()
    with pytest.raises(IndexError, match="^length: expected at least"):
        cache.trim(100)
    assert cache.offset == 605 == cache.core.length


def test_a_trim_that_one_layer_cannot_make_changes_none():
    whole, windowed = filled(200), filled(200, window=WINDOW)
    windowed.update_and_fetch(rows(1), rows(1))
    most = windowed.can_roll_back()
    assert most < 100
    assert speculation.can_trim_prompt_cache([whole, windowed])
    with pytest.raises(ValueError, match=f"^num_tokens: expected at most {most} in layer 1.*; got 100"):
        speculation.trim_prompt_cache([whole, windowed], 100)
    rotating = stock.RotatingKVCache(50, keep=4)
    for _ in range(60):
        rotating.update_and_fetch(rows(1), rows(1))
    with pytest.raises(ValueError, match=r"^cache\[1\]: expected one that can drop 1 tokens; got RotatingKVCache"):
        speculation.trim_prompt_cache([whole, rotating], 1)
    batch = BatchKV4Cache([filled(200, window=WINDOW, record_past=True), windowed])
    with pytest.raises(IndexError, match=f"^n: expected at most {most}, what row 1 can drop; got 100"):
        batch.trim(100)
    assert (whole.offset, windowed.offset, batch.rows[0].offset) == (200, 201, 200)
    assert speculation.trim_prompt_cache([whole, windowed], 0) == 0
    assert speculation.trim_prompt_cache([filled(5), filled(5)], 3) == 3
    assert speculation.trim_prompt_cache([rotating], 1) == 0  # mlx-lm's own answer where no cache is kv4's


def test_copies_go_their_own_way_and_share_pages():
    cache = filled(300)
    cache.core.seal()
    twin = copy.deepcopy(cache)
    twin.update_and_fetch(rows(5), rows(5))
    assert (cache.offset, twin.offset) == (300, 305)
    assert mx.array_equal(cache.keys, twin.keys[:, :, :300])


def test_nbytes_counts_the_core_and_shrinks():
    ours, own = filled(4096), stock.KVCache()
    own.update_and_fetch(rows(4096).astype(mx.float16), rows(4096).astype(mx.float16))
    ours.core.seal()
    assert ours.nbytes == ours.core.nbytes()
    packed = 2 * 32 * 4096 * 2 * (4 + 16 / 32) / 8  # codes and scales of keys and values
    exact = 2 * 32 * (4 + 64 + 64) * 2 * 4  # sinks and window in float32
    assert packed < ours.nbytes < packed + exact + own.nbytes / 50
    assert KV4Cache().nbytes == 0


def test_a_sealed_prompt_takes_less_and_goes_on_as_an_unsealed_one():
    ours, twin = filled(600), filled(600)
    twin.seal()
    assert twin.nbytes < ours.nbytes / 2
    for cache in (ours, twin):
        cache.update_and_fetch(rows(1), rows(1))
    assert mx.array_equal(ours.keys, twin.keys) and mx.array_equal(ours.values, twin.values)
    KV4Cache().seal()


def test_bytes_of_a_model_s_caches_count_a_shared_rotation_once():
    layers = [filled(100), filled(100), stock.KVCache()]
    layers[2].update_and_fetch(rows(8), rows(8))
    ((_, shared, _),) = layers[0].core.shared()
    assert shared > 0 and layers[0].core.shared() == layers[1].core.shared()
    assert kv4.mlx.nbytes(layers) == sum(layer.nbytes for layer in layers) - shared
    assert kv4.mlx.nbytes([]) == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("held", [0, WINDOW - 1, WINDOW, 200])
@pytest.mark.parametrize("tokens", [1, 2, 80])
@pytest.mark.parametrize("asked", [None, 20, WINDOW])
def test_make_mask_says_what_the_models_own_cache_says(packed, window, held, tokens, asked):
    """Seen through attention: the same output as mlx-lm's cache under its own mask."""
    ours = KV4Cache(Recipe.exact(), window=window, packed=packed)
    own = stock.RotatingKVCache(window) if window else stock.KVCache()
    out = []
    q = rows(tokens, 4, seed=2)
    for cache in (ours, own):
        if held:
            cache.update_and_fetch(rows(held, seed=3), rows(held, seed=4))
        if held > 100:  # rotating caches go round
            cache.update_and_fetch(rows(1, seed=5), rows(1, seed=6))
        mask = cache.make_mask(tokens, window_size=asked, return_array=False)
        out.append(attend(cache, q, *cache.update_and_fetch(rows(tokens), rows(tokens, seed=1)), mask=mask))
    assert mx.allclose(out[0], out[1], atol=1e-5)


def test_return_array_gives_an_array_of_all_columns():
    cache = filled(30)
    assert cache.make_mask(5, return_array=True).shape == (5, 35)
    assert cache.make_mask(5) == "causal" and cache.make_mask(1) is None


# Ragged batches.


def test_left_padding_is_never_taken_in():
    batch = BatchKV4Cache([KV4Cache(Recipe.exact()) for _ in range(2)], left_padding=[4, 0])
    assert batch.offset.tolist() == [-4, 0]
    k, v, q = rows(10, batch=2), rows(10, batch=2, seed=1), rows(10, 4, batch=2, seed=2)
    out = attend(batch, q, *batch.update_and_fetch(k, v))
    assert batch.offset.tolist() == [6, 10] and [row.offset for row in batch.rows] == [6, 10]
    assert batch.left_padding.tolist() == [4, 0]
    own = stock.BatchKVCache([4, 0])
    mask = own.make_mask(10)
    expected = attend(own, q, *own.update_and_fetch(k, v), mask=mask)
    assert mx.allclose(out[0, :, 4:], expected[0, :, 4:], atol=1e-5) and mx.allclose(out[1], expected[1], atol=1e-5)
    assert not mx.any(out[0, :, :4])
    assert mx.array_equal(batch.dense("keys")[0, :, 4:], k[0, :, 4:])


class Counted:
    """A core that counts calls."""

    def __init__(self, core):
        self.core, self.calls = core, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.core, name)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper()], ids=["default", "paper"])
def test_a_step_of_a_batch_is_one_call_and_each_row_what_it_is_alone(recipe):
    threads = _core.num_threads()
    _core.set_num_threads(1)  # how work is cut among threads depends on all of a call
    try:
        alone = [KV4Cache(recipe, window=WINDOW) for _ in range(3)]
        batch = BatchKV4Cache([KV4Cache(recipe, window=WINDOW) for _ in range(3)], [200, 0, 25])
        calls = [(20, [20, 0, 20]), (100, [100, 0, 5]), (100, [80, 0, 0]), (1, [0, 0, 0])]
        for seed, (tokens, padding) in enumerate(calls):
            k, v, q = (rows(tokens, heads, 3, 9 * seed + n) for n, heads in enumerate((2, 2, 4)))
            handles = batch.update_and_fetch(k, v)
            core = batch.core._core = Counted(batch.core._core)
            out = attend(batch, q, *handles)
            assert [name for name in core.calls if name.startswith("attend")] == ["attend"]
            batch.core._core = core.core
            for i, (cache, lo) in enumerate(zip(alone, padding, strict=True)):
                assert not mx.any(out[i, :, :lo])
                if lo < tokens:
                    own = [x[i : i + 1, :, lo:] for x in (q, k, v)]
                    want = attend(cache, own[0], *cache.update_and_fetch(*own[1:]))
                    assert mx.array_equal(out[i : i + 1, :, lo:], want)
        assert [row.offset for row in batch.rows] == [cache.offset for cache in alone] == [21, 221, 196]
    finally:
        _core.set_num_threads(threads)


def test_filter_extend_extract_and_trim():
    def batch(*lengths):
        return KV4Cache.merge([filled(n, recipe=Recipe.exact()) for n in lengths])

    joined = batch(5, 80)
    joined.extend(batch(200))
    assert joined.offset.tolist() == [5, 80, 200] and joined.size() == 200
    joined.filter([2, 0])
    assert joined.offset.tolist() == [200, 5]
    single = joined.extract(0)
    single.trim(50)
    assert joined.rows[0].offset == 200 and single.offset == 150
    assert joined.trim(10) == 5 and joined.offset.tolist() == [195, 0]
    joined.filter(mx.array([0]))
    assert joined.nbytes == joined.rows[0].nbytes and not joined.empty() and joined.is_trimmable()


def test_a_batch_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"^rows\[1\]: expected the recipe and window"):
        BatchKV4Cache([KV4Cache(), KV4Cache(Recipe.exact())])
    with pytest.raises(ValueError, match=r"^rows\[0\]: expected a packed KV4Cache"):
        BatchKV4Cache([KV4Cache(packed=False)])
    batch = BatchKV4Cache([filled(5), filled(9)])
    with pytest.raises(ValueError, match="^left_padding: expected an empty cache"):
        batch.prepare(left_padding=[1, 0])
    with pytest.raises(ValueError, match="^lengths: expected"):
        batch.prepare(right_padding=[1, 0])
    with pytest.raises(ValueError, match="^keys: expected"):
        batch.update_and_fetch(rows(3), rows(3))
    with pytest.raises(ValueError, match="^mask: expected a model"):
        batch.make_mask(3, window_size=2)
    for k, v in ((rows(3, batch=2), rows(2, batch=2)), (rows(3, batch=2, dtype=mx.float16),) * 2, (rows(3, 4, 2),) * 2):
        with pytest.raises(ValueError, match=r"^(keys|values): expected mlx.core.float32 \[2, 2, 3, 32\]"):
            batch.update_and_fetch(k, v)
    other = BatchKV4Cache([filled(5), KV4Cache()])
    with pytest.raises(ValueError, match="^keys: expected"):
        other.update_and_fetch(rows(3, batch=2, dtype=mx.float16), rows(3, batch=2, dtype=mx.float16))
    assert [row.offset for row in other.rows] == [5, 0]
    handles = batch.update_and_fetch(rows(3, batch=2), rows(3, batch=2))
    with pytest.raises(ValueError, match="^mask: expected None"):
        attend(batch, rows(3, 4, batch=2), *handles, mask=mx.ones((3, 12), dtype=mx.bool_))
    with pytest.raises(ValueError, match="^queries: expected"):
        attend(batch, rows(2, 4, batch=2), *handles)


# attach, detach, make_prompt_cache.


def test_attach_and_detach():
    model = model_of("llama")
    assert kv4.mlx.why_not(model) is None
    own = greedy(model, prompt_of(20), 5)
    assert kv4.mlx.attach(model, Recipe.exact()) is model
    assert type(stock.make_prompt_cache(model)[0]) is KV4Cache
    assert stock.make_prompt_cache(model)[0].recipe == Recipe.exact()
    kv4.mlx.attach(model)
    assert stock.make_prompt_cache(model)[0].recipe == Recipe()
    assert llama.scaled_dot_product_attention is scaled_dot_product_attention
    assert base.scaled_dot_product_attention is not scaled_dot_product_attention
    assert greedy(model, prompt_of(20), 5, stock.make_prompt_cache(model_of("llama", num_hidden_layers=3))) == own
    kv4.mlx.detach(model)
    kv4.mlx.detach(model)
    assert type(stock.make_prompt_cache(model)[0]) is stock.KVCache


def test_a_model_whose_make_cache_mixes_kinds_keeps_the_others():
    model = model_of("gemma3_text")
    kinds = [type(c) for c in model.make_cache()]
    caches = kv4.mlx.make_prompt_cache(model)
    assert [c.window for c in caches] == [WINDOW if kind is stock.RotatingKVCache else 0 for kind in kinds]

    class Mixed(type(model)):
        def make_cache(self):
            return [stock.ArraysCache(size=2), stock.RotatingKVCache(50, keep=4), *super().make_cache()[2:]]

    mixed = Mixed(model.args)
    caches = kv4.mlx.make_prompt_cache(mixed)
    assert [type(c) for c in caches[:3]] == [stock.ArraysCache, stock.RotatingKVCache, KV4Cache]


def test_refusals_of_attach():
    class NoCache(llama.Model):
        def make_cache(self):
            return [stock.ArraysCache(size=2)]

    model = model_of("llama")
    for call, match in (
        (lambda: kv4.mlx.attach("llama"), "^model: expected a model of mlx-lm; got str"),
        (lambda: kv4.mlx.attach(NoCache(model.args)), "^model: expected at least one layer.*got ArraysCache"),
        (lambda: kv4.mlx.attach(model, "int4"), "^recipe: expected"),
        (lambda: kv4.mlx.attach(model, Recipe(key=Side(mean=True, group=64))), "^recipe: expected one that serves"),
        (lambda: kv4.mlx.attach(model, lambda_k=[mx.ones((2, 32))]), "^lambda_k: expected one entry per layer"),
        (lambda: kv4.mlx.attach(model, lambda_k={7: mx.ones((2, 32))}), "^lambda_k: expected layer indices"),
        (lambda: kv4.mlx.attach(model, lambda_k=mx.ones(32)), r"^lambda_k\[0\]: expected a matrix"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert "make_cache" not in vars(model)
    assert kv4.mlx.why_not("llama") is not None


def test_a_given_lambda_reaches_the_core():
    recipe = Recipe(key=Side(mean=True, lambda_="given"))
    model = model_of("llama")
    values = mx.exp(mx.random.normal((2, 32), key=mx.random.key(1)))
    caches = kv4.mlx.make_prompt_cache(model, recipe, lambda_k=values)
    greedy(model, prompt_of(200), 2, caches)
    assert np.allclose(caches[0].core.lambda_(0), np.array(values).reshape(-1))
