"""The cache's own contract: every method of a transformers cache, handles, masks, attach, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import hf_cases
import kv4.hf
import kv4.hf.handle
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe, Side
from kv4.hf.cache import KV4Layer
from kv4.hf.mask import expand, row_limits

KV_HEADS, DIM, Q_HEADS = 2, 32, 4


def rows_of(tokens, batch=2, heads=KV_HEADS, dim=DIM, seed=0):
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def causal_module(training=False):
    module = torch.nn.Module()
    module.is_causal = True
    module.num_key_value_groups = Q_HEADS // KV_HEADS
    return module.train(training)


def filled(tokens, recipe=None, sliding_window=None, batch=2):
    layer = KV4Layer(recipe or Recipe.exact(), sliding_window=sliding_window)
    k, v = rows_of(tokens, batch, seed=1), rows_of(tokens, batch, seed=2)
    return layer, k, v, layer.update(k, v, 0)


def softmax_attention(q, k, v, keep, sinks=None, softcap=None, bias=None):
    """The definition, in float64; a row that sees nothing is 0. [batch, T, q_heads, dim]"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores if bias is None else scores + bias).masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


# ---- the methods


def test_update_reads_any_strides():
    """Prefill's keys are [batch, tokens, heads, dim] in memory; phi3's values a slice of fused projections."""
    fused = torch.randn(2, 9, KV_HEADS * DIM * 3)
    k = fused[..., : KV_HEADS * DIM].unflatten(-1, (KV_HEADS, DIM)).transpose(1, 2)
    v = fused[..., -KV_HEADS * DIM :].unflatten(-1, (KV_HEADS, DIM)).transpose(1, 2)
    upright = torch.randn(2, KV_HEADS, DIM, 5).mT  # channels are not adjacent
    layer = KV4Layer(Recipe.exact())
    layer.update(k, v, 0)
    layer.update(upright, upright, 0)
    assert torch.equal(layer.keys, torch.cat([k, upright], 2))
    assert torch.equal(layer.values, torch.cat([v, upright], 2))


def test_lazy_initialization_with_no_tokens():
    model = hf_cases.model_of("qwen3")
    cache = kv4.hf.KV4Cache(model.config)
    cache.early_initialization(batch_size=2, num_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, device="cpu")
    assert cache.is_initialized and cache.get_seq_length() == 0
    cache.batch_repeat_interleave(3)
    cache.crop(0)
    key, _ = cache.update(rows_of(0), rows_of(0), 0)
    assert tuple(key.shape) == (2, KV_HEADS, 0, DIM)
    key, _ = cache.update(rows_of(3), rows_of(3), 0)
    assert tuple(key.shape) == (2, KV_HEADS, 3, DIM) and cache.get_seq_length() == 3


@pytest.mark.parametrize("window", [None, 24, 100])
def test_mask_sizes_announce_the_update(window):
    layer = KV4Layer(Recipe.exact(), sliding_window=window)
    stock = DynamicCache(config=hf_cases.model_of("mistral", window).config).layers[0] if window else None
    seen = 0
    for tokens in (5, 1, 70, 1, 1, 20):
        sizes = layer.get_mask_sizes(tokens)
        if stock is not None:
            assert sizes == stock.get_mask_sizes(tokens)
            stock.update(rows_of(tokens), rows_of(tokens))
        key, value = layer.update(rows_of(tokens), rows_of(tokens), 0)
        seen += tokens
        assert (key.shape[2], key.offset) == sizes and value.shape[2] == sizes[0]
        assert key.offset + key.shape[2] == seen == layer.get_seq_length()
        assert layer.get_max_length() == -1
        assert key.dense().shape == key.shape


def test_batch_operations():
    layer, k, _, _ = filled(70, batch=3)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, k[[2, 0, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, k[[2, 2, 0, 0, 0, 0]])
    layer.batch_select_indices(torch.tensor([True, False, True, False, False, False]))
    assert torch.equal(layer.keys, k[[2, 0]])
    layer.batch_select_indices(torch.tensor([-1]))
    assert torch.equal(layer.keys, k[[0]])
    layer.update(rows_of(1, 1), rows_of(1, 1), 0)
    with pytest.raises(IndexError, match=r"rows.*expected.*got 3"):
        layer.reorder_cache(torch.tensor([3]))
    with pytest.raises(ValueError, match="repeats: expected at least 1; got 0"):
        layer.batch_repeat_interleave(0)
    assert layer.get_seq_length() == 71


def test_batch_operations_and_crop_of_sealed_pages():
    layer, *_ = filled(300, Recipe(), batch=3)
    layer.update(rows_of(1, 3), rows_of(1, 3), 0)
    assert layer.core.sealed_tokens(0) == 192
    before = layer.keys
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.keys, before[[1, 1, 0]])
    layer.crop(-101)  # into the last sealed page
    assert layer.get_seq_length() == 200
    assert torch.equal(layer.keys, before[[1, 1, 0], :, :200])


def test_reset_returns_the_memory_and_opens_the_batch():
    model = hf_cases.model_of("gemma3", 150)
    cache = kv4.hf.KV4Cache(model.config)
    for index in range(2):
        cache.update(rows_of(200), rows_of(200), index)
    assert cache.nbytes() >= 2 * 2 * 200 * KV_HEADS * DIM * 4
    cache.reset()
    assert cache.nbytes() == 0 and cache.get_seq_length() == 0 and cache.layers[0].keys is None
    half = rows_of(3, batch=5, dim=64).to(torch.bfloat16)
    key, _ = cache.update(half, half, 0)
    assert key.dtype == torch.bfloat16 and tuple(key.shape) == (5, KV_HEADS, 3, 64)


def test_offload_and_prefetch_leave_everything_in_place():
    layer, k, _, _ = filled(5)
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, k)


def test_crop():
    layer, k, _, _ = filled(90)
    layer.crop(0)
    assert layer.get_seq_length() == 90
    layer.crop(-25)
    assert torch.equal(layer.keys, k[:, :, :65])
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or a negative number of tokens; got 3"):
        layer.crop(3)
    with pytest.raises(IndexError, match="tokens_to_remove: expected between -65 and 0; got -66"):
        layer.crop(-66)
    assert torch.equal(layer.keys, k[:, :, :65])
    KV4Layer(Recipe.exact()).crop(-4)  # a layer that has seen nothing, as in models that share keys and values


@pytest.mark.parametrize("recipe", [Recipe.exact(), Recipe()])
def test_crop_of_a_sliding_window_is_all_or_nothing(recipe):
    config = hf_cases.model_of("gemma3", 24).config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    cache = kv4.hf.KV4Cache(config, recipe)
    for _ in range(3):
        for index in range(2):
            cache.update(rows_of(90), rows_of(90), index)
    with pytest.raises(IndexError, match="expected.*left the sliding window.*got"):
        cache.crop(-200)
    assert [layer.get_seq_length() for layer in cache.layers] == [270, 270]

    recording = kv4.hf.KV4Cache(config, recipe)
    recording.activate_past_recording()
    assert recording.is_recording_past(0)
    for index in range(2):
        recording.update(rows_of(90), rows_of(90), index)
    recording.crop(-60)
    assert [layer.get_seq_length() for layer in recording.layers] == [30, 30]
    recording.layers[0].record_past = False  # as generate() does when it hands the cache back
    assert not recording.is_recording_past(0)


def test_several_sliding_windows_crop_together():
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=24)
    cache = kv4.hf.KV4Cache(config, Recipe.exact())
    cache.layers[0] = KV4Layer(Recipe.exact(), sliding_window=200)
    for tokens in (90, 90, 90):
        for index in range(2):
            cache.update(rows_of(tokens), rows_of(tokens), index)
    key = cache.layers[0].keys
    with pytest.raises(IndexError):
        cache.crop(-100)  # the second layer refuses
    assert [layer.get_seq_length() for layer in cache.layers] == [270, 270]
    assert torch.equal(cache.layers[0].keys, key)


def test_a_cache_is_not_compileable_and_is_croppable():
    cache = kv4.hf.KV4Cache(hf_cases.model_of("qwen3").config)
    assert not cache.is_compileable and cache.is_croppable
    assert cache.is_sliding == [False, False]
    assert kv4.hf.KV4Cache(hf_cases.model_of("gemma3").config).is_sliding == [True, False]


def test_deepcopy_is_independent():
    layer, *_ = filled(300, Recipe())
    layer.update(rows_of(1), rows_of(1), 0)
    twin = copy.deepcopy(layer)
    before = layer.keys
    twin.crop(-250)
    twin.update(rows_of(7), rows_of(7), 0)
    assert layer.get_seq_length() == 301 and torch.equal(layer.keys, before)
    assert twin.get_seq_length() == 58


def test_describe_and_nbytes():
    model = hf_cases.model_of("gemma3", 150)
    cache = kv4.hf.KV4Cache(model.config)
    rows = cache.describe()
    assert [row["type"] for row in rows] == ["sliding_attention", "full_attention"]
    for index in range(2):
        cache.update(rows_of(300, 1), rows_of(300, 1), index)
        cache.update(rows_of(1, 1), rows_of(1, 1), index)
    sliding, full = cache.describe()
    assert full["tokens"] == 301 and full["sealed"] == [192] and full["exact"] == [301 - 192]
    assert full["head_dim"] == (DIM, DIM) and full["kv_heads"] == KV_HEADS and full["dtype"] == "float32"
    assert sliding["sliding_window"] == 150 and sliding["first"] > 0
    assert sum(row["nbytes"] for row in cache.describe()) == cache.nbytes()
    assert "tokens=301" in repr(cache)


def test_layers_without_keys_and_values_are_those_of_transformers():
    config = transformers.Qwen3NextConfig(
        num_hidden_layers=4, layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    )
    cache = kv4.hf.KV4Cache(config)
    kinds = [isinstance(layer, KV4Layer) for layer in cache.layers]
    assert kinds == [False, False, False, True]
    state = torch.zeros(2, 16, 4)
    cache.update_conv_state(state, 0)
    assert cache.nbytes() >= state.nbytes
    assert DynamicCache(config=config).layers[3].__class__.__name__ == "DynamicLayer"  # no type was replaced


# ---- attention on handles


MASKS = ["none", "padding", "window", "padding and window", "boolean", "boolean per head", "additive"]


def mask_of(kind, batch, tokens, columns):
    """(what the kv4 attention gets, the columns that are visible, what is added to the scores)"""
    keep = expand(None, None, tokens, columns, torch.device("cpu")).expand(batch, 1, tokens, columns)
    if kind == "none":
        return None, keep, None
    if kind in ("padding", "window", "padding and window"):
        start = [0, columns // 3] if "padding" in kind else [0, 0]
        window = 40 if "window" in kind else 0
        mask = torch.tensor([[[[s, window]]] for s in start], dtype=torch.int32)
        return mask, expand(*row_limits(mask.clone())[:2], tokens, columns, torch.device("cpu")), None
    generator = torch.Generator().manual_seed(4)
    heads = Q_HEADS if kind == "boolean per head" else 1
    keep = keep & (torch.rand(batch, heads, tokens, columns, generator=generator) < 0.7)
    if kind != "additive":
        return keep, keep, None
    bias = torch.randn(batch, 1, tokens, columns, generator=generator)
    return bias.masked_fill(~keep, -torch.inf), keep, bias


@pytest.mark.parametrize("extra", ["plain", "sinks", "softcap", "both"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("earlier", "tokens"), [(0, 20), (0, 150), (130, 1), (130, 30), (130, 100)])
def test_attention_is_softmax_attention(earlier, tokens, kind, extra):
    """Prefill by flash and by the core, later chunks merged through their log-sum-exp, decode; asked twice."""
    layer = KV4Layer(Recipe.exact())
    k, v, q = rows_of(earlier + tokens, seed=1), rows_of(earlier + tokens, seed=2), rows_of(tokens, heads=Q_HEADS)
    if earlier:
        layer.update(k[:, :, :earlier], v[:, :, :earlier], 0)
    key, value = layer.update(k[:, :, earlier:], v[:, :, earlier:], 0)
    mask, keep, bias = mask_of(kind, 2, tokens, earlier + tokens)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]) if extra in ("sinks", "both") else None
    softcap = 1.5 if extra in ("softcap", "both") else None
    expected = softmax_attention(q, k, v, keep, sinks, softcap, bias)
    answers = []
    for _ in range(2):
        out, weights = kv4.hf.kv4_attention(
            causal_module(), q, key, value, mask, softcap=softcap, s_aux=sinks, dropout=0.0
        )
        assert weights is None and out.is_contiguous() and out.dtype == q.dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
        answers.append(out)
    assert torch.equal(*answers)
    # The same over dense tensors: no cache, cross-attention, another cache.
    out, _ = kv4.hf.kv4_attention(causal_module(), q, k, v, mask, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 10, 100])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper(), Recipe.exact()])
def test_one_handle_gives_one_answer(recipe, tokens):
    layer, *_ = filled(300, recipe)
    key, value = layer.update(rows_of(tokens), rows_of(tokens), 0)
    q = rows_of(tokens, heads=Q_HEADS, seed=5)
    first, second = (kv4.hf.kv4_attention(causal_module(), q, key, value, None)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("window", [None, 150])
def test_sealed_attention_is_attention_over_the_dequantised_cache(window):
    layer, *_ = filled(300, Recipe(key=Side(mean=True)), sliding_window=window)
    for step in range(5):
        key, value = layer.update(rows_of(1, seed=step), rows_of(1, seed=9 + step), 0)
        q = rows_of(1, heads=Q_HEADS, seed=5)
        fused = kv4.hf.kv4_attention(causal_module(), q, key, value, None)[0]
        everything = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)
        expected = softmax_attention(q, key.dense(), value.dense(), everything)
        assert (fused - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert layer.core.sealed_tokens(0) >= 64


def test_later_chunks_read_sealed_pages():
    """A long call after sealing: earlier tokens packed, its own tokens exact."""
    layer, *_ = filled(300, Recipe(key=Side(mean=True)))
    k, v, q = rows_of(100, seed=7), rows_of(100, seed=8), rows_of(100, heads=Q_HEADS, seed=9)
    key, value = layer.update(k, v, 0)
    assert layer.core.sealed_tokens(0) == 192
    dense = key.dense(), value.dense()
    assert torch.equal(dense[0][:, :, 300:], k) and torch.equal(dense[1][:, :, 300:], v)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    keep = expand(None, None, 100, 400, torch.device("cpu"))
    expected = softmax_attention(q, *dense, keep, sinks)
    out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None, s_aux=sinks)
    assert (out - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_padding_that_reaches_into_a_later_chunk():
    """A sliding layer's columns begin late, and row 1's first token comes within the second long call."""
    window, sizes = 24, (90, 100)
    padding = torch.ones(2, sum(sizes), dtype=torch.bool)
    padding[1, :110] = False
    layer, pattern = KV4Layer(Recipe.exact(), sliding_window=window), sliding_window_causal_mask_function(window)
    for tokens in sizes:
        columns, offset = layer.get_mask_sizes(tokens)
        place = (2, tokens, columns, layer.get_seq_length(), offset, pattern, padding[:, : offset + columns])
        k, v, q = rows_of(tokens, seed=1), rows_of(tokens, seed=2), rows_of(tokens, heads=Q_HEADS)
        key, value = layer.update(k, v, 0)
        mask = kv4.hf.kv4_mask(*place)
        assert mask.dtype == torch.int32
        out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, mask)
        expected = softmax_attention(q, key.dense(), value.dense(), sdpa_mask(*place, allow_is_causal_skip=False))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_bidirectional_attention_over_a_cache():
    _, k, v, (key, value) = filled(80)
    q = rows_of(80, heads=Q_HEADS)
    out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None, is_causal=False)
    expected = softmax_attention(q, k, v, torch.ones(1, 1, 80, 80, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_sliding_window_argument_counts_without_a_mask():
    _, k, v, (key, value) = filled(50)
    q = rows_of(50, heads=Q_HEADS)
    keep = expand(None, torch.tensor([7, 7], dtype=torch.int32), 50, 50, torch.device("cpu"))
    expected = softmax_attention(q, k, v, keep)
    for pair in ((key, value), (k, v)):
        out, _ = kv4.hf.kv4_attention(causal_module(), q, *pair, None, sliding_window=7)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


# ---- handles


def test_a_stale_handle_says_so():
    layer, _, _, (key, value) = filled(90)
    q = rows_of(1, heads=Q_HEADS)
    changes = [
        lambda: layer.update(rows_of(1), rows_of(1), 0),
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_repeat_interleave(1),
        lambda: layer.reset(),
    ]
    for change in changes:
        key, value = layer.update(rows_of(1), rows_of(1), 0) if layer.seen else (key, value)
        change()
        with pytest.raises(RuntimeError, match="key: expected the handle of the layer's newest state.*stale"):
            kv4.hf.kv4_attention(causal_module(), q, key, value, None)
        with pytest.raises(RuntimeError, match="stale"):
            key + 1


def test_a_handle_is_a_tensor_to_everyone_else():
    _, k, v, (key, value) = filled(12)
    q = rows_of(12, heads=KV_HEADS)
    assert key.shape == k.shape and key.size(2) == 12 and key.dim() == key.ndim == 4
    assert key.dtype == k.dtype and key.device == k.device and len(key) == 2
    assert torch.equal(torch.matmul(q, key.transpose(-1, -2)), q @ k.mT)
    assert torch.equal(q @ key.mT, q @ k.mT) and torch.equal(key @ q.mT, k @ q.mT)
    assert torch.equal(key[:, :1, None], k[:, :1, None])
    assert torch.equal(torch.cat([key, value], 2), torch.cat([k, v], 2))
    assert torch.equal(2 * key - 1, 2 * k - 1) and torch.equal(-key, -k)
    assert key.contiguous() is key and key.to("cpu") is key and key.to(torch.float32, non_blocking=True) is key
    assert key.to(torch.float64).dtype == torch.float64
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(sdpa(q, key, value), sdpa(q, k, v))


def test_the_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(kv4.hf.handle, "_warned", False)
    _, _, _, (key, value) = filled(12)
    with pytest.warns(UserWarning, match=r"without the kv4 attention the same cache still gives right answers \(dequ"):
        key.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value.sum()
        filled(5)[3][0].sum()


BYPASSING = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "n_positions": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("name", list(BYPASSING))
def test_models_that_bypass_the_attention_interface(name):
    config = transformers.AutoConfig.for_model(
        name, vocab_size=hf_cases.VOCAB, eos_token_id=None, bos_token_id=1, initializer_range=0.15, **BYPASSING[name]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = hf_cases.left_padded(2, 80)
    outputs = [
        hf_cases.generate(model, cache, inputs, 8, num_beams=2, do_sample=False, pad_token_id=0)
        for cache in (DynamicCache(config=config), kv4.hf.KV4Cache(config, Recipe.exact()))
    ]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    with pytest.raises(ValueError, match=r"model: expected a model built on transformers' attention interface; got"):
        if kv4.hf.why_not(model) is None:
            pytest.skip(f"{name} takes the attention interface in this version")
        kv4.hf.attach(model)


# ---- masks


def mask(q, kv, q_offset, kv_offset=0, function=causal_mask_function, padding=None, batch=2, **kwargs):
    return kv4.hf.kv4_mask(batch, q, kv, q_offset, kv_offset, function, padding, **kwargs)


def test_compact_masks():
    window = sliding_window_causal_mask_function(10)
    assert mask(5, 5, 0) is None and mask(1, 40, 39) is None
    assert mask(5, 8, 3, function=window) is None  # the window hides nothing yet
    assert mask(1, 40, 39, function=window).tolist() == [[[[0, 10]]], [[[0, 10]]]]
    padding = torch.ones(2, 40, dtype=torch.bool)
    assert mask(40, 40, 0, padding=padding) is None
    padding[1, :7] = False
    assert mask(40, 40, 0, padding=padding).tolist() == [[[[0, 0]]], [[[7, 0]]]]
    assert mask(40, 40, 0, padding=padding.long()).dtype == torch.int32
    # A sliding layer's columns begin at position 5: two of row 1's padding tokens are left.
    assert mask(1, 35, 39, 5, window, padding).tolist() == [[[[0, 10]]], [[[2, 10]]]]
    padding[1] = False
    assert mask(1, 40, 39, padding=padding).tolist() == [[[[0, 0]]], [[[40, 0]]]]


@pytest.mark.parametrize("function", ["causal", "window", "chunked"])
@pytest.mark.parametrize("padding", ["none", "left", "holes", "short"])
@pytest.mark.parametrize(
    ("q", "kv", "q_offset", "kv_offset"), [(12, 12, 0, 0), (3, 12, 9, 0), (3, 12, 12, 3), (4, 9, 0, 0)]
)
def test_masks_mean_what_sdpa_masks_mean(function, padding, q, kv, q_offset, kv_offset):
    pattern = {
        "causal": causal_mask_function,
        "window": sliding_window_causal_mask_function(5),
        "chunked": chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    }[function]
    valid = None if padding == "none" else torch.ones(2, kv + kv_offset, dtype=torch.bool)
    if padding in ("left", "holes"):
        valid[1, : kv_offset + 2] = False
    if padding == "holes":
        valid[0, kv_offset + 4] = False
    if padding == "short":
        valid = valid[:, :-2]
    expected = sdpa_mask(2, q, kv, q_offset, kv_offset, pattern, valid, allow_is_causal_skip=False)
    got = mask(q, kv, q_offset, kv_offset, pattern, valid)
    if got is None:
        got = expand(None, None, q, kv, torch.device("cpu"))
    elif got.dtype == torch.int32:
        got = expand(*row_limits(got)[:2], q, kv, torch.device("cpu"))
    assert torch.equal(got.expand(2, 1, q, kv), expected)


def test_a_mask_that_must_be_dense_is():
    assert mask(5, 5, 0, allow_is_causal_skip=False).dtype == torch.bool


# ---- what is refused


def test_bad_tensors_leave_the_cache_as_it_was():
    layer, k, v, _ = filled(90)
    good = rows_of(1)
    bad = [
        (rows_of(1, heads=3), good, "k: expected .*shape.*2.*got .*3"),
        (rows_of(1, dim=16), good, "k: expected .*32.*got .*16"),
        (good, rows_of(1, dim=16), "v: expected .*32.*got .*16"),
        (rows_of(1, batch=3), rows_of(1, batch=3), "k: expected .*got .*3"),
        (good, rows_of(2), "v: expected .*got"),
        (good[0], good, "k: expected 4 axes"),
        (good.to(torch.float16), good, "key_states: expected the layer's dtype torch.float32; got torch.float16"),
        (good, good.double(), "value_states: expected the layer's dtype torch.float32; got torch.float64"),
        (good.to("meta"), good, "key_states: expected a tensor on the CPU; got meta"),
    ]
    for key, value, message in bad:
        with pytest.raises(ValueError, match=message):
            layer.update(key, value, 0)
        assert layer.get_seq_length() == 90
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            "key_states: expected a tensor .batch, kv_heads, tokens, head_dim.",
        ),
        (rows_of(1).to("meta"), rows_of(1), "key_states: expected a tensor on the CPU; got meta"),
        (rows_of(1).long(), rows_of(1), "key_states: expected float32, float16 or bfloat16; got torch.int64"),
        (rows_of(1), rows_of(1).half(), "value_states: expected the keys' dtype torch.float32; got torch.float16"),
        (rows_of(1), rows_of(2), "v: expected"),
    ],
)
def test_a_refused_first_update_leaves_the_layer_empty(key, value, message):
    layer = KV4Layer(Recipe())
    with pytest.raises(ValueError, match=message):
        layer.update(key, value, 0)
    assert not layer.is_initialized and layer.get_seq_length() == 0 and layer.nbytes() == 0
    layer.update(rows_of(2, batch=4), rows_of(2, batch=4), 0)


def test_a_head_dim_that_the_recipe_does_not_serve():
    layer = KV4Layer(Recipe())
    odd = rows_of(1, dim=33)
    with pytest.raises((ValueError, NotImplementedError), match=r"head_dim_k: expected.*got 33"):
        layer.update(odd, odd, 0)
    assert not layer.is_initialized
    KV4Layer(Recipe.exact()).update(odd, odd, 0)  # an exact cache serves any


def test_bad_queries():
    _, _, _, (key, value) = filled(20)

    def attend(q, mask=None, **kwargs):
        return kv4.hf.kv4_attention(causal_module(), q, key, value, mask, **kwargs)

    for q in (
        rows_of(1, heads=3),
        rows_of(1, heads=Q_HEADS, dim=16),
        rows_of(1, batch=1, heads=Q_HEADS),
        rows_of(1)[0],
    ):
        with pytest.raises(ValueError, match=r"q(uery)?: expected.*got"):
            attend(q)
    q = rows_of(1, heads=Q_HEADS)
    with pytest.raises(ValueError, match="attention_mask: expected at most 20 columns.*got 21"):
        attend(q, torch.ones(2, 1, 1, 21, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask: expected int32"):
        attend(q, torch.ones(2, 1, 1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"mask: expected.*got"):
        attend(q, torch.ones(2, 1, 5, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sinks: expected 4 values"):
        attend(q, s_aux=torch.zeros(3))
    other = filled(20)[3][1]
    with pytest.raises(ValueError, match="value: expected the handle of the same layer"):
        kv4.hf.kv4_attention(causal_module(), q, key, other, None)
    assert torch.isfinite(attend(q)[0]).all()


@pytest.mark.parametrize("tokens", [10, 100])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(tokens, where, value):
    """Refused by name where a query sees them; nothing of them is left where none does."""
    tensors = {"q": rows_of(tokens, heads=Q_HEADS), "k": rows_of(tokens, seed=1), "v": rows_of(tokens, seed=2)}
    clean = {name: x.clone() for name, x in tensors.items()}
    tensors[where][1, :, 3] = value
    padding = torch.tensor([[[[0, 0]]], [[[4, 0]]]], dtype=torch.int32)
    for recipe in (Recipe.exact(), Recipe()):
        answers = []
        for x in (tensors, clean):
            layer = KV4Layer(recipe)
            key, values = layer.update(x["k"], x["v"], 0)
            answers.append(kv4.hf.kv4_attention(causal_module(), x["q"], key, values, padding)[0])
            if x is tensors:
                with pytest.raises(ValueError, match=rf"{where}: expected finite values"):
                    kv4.hf.kv4_attention(causal_module(), x["q"], key, values, None)
        torch.testing.assert_close(*answers, rtol=0, atol=1e-5)


def test_training_is_refused_and_inference_with_gradients_on_is_not():
    for tokens in (10, 100):
        _, _, _, (key, value) = filled(tokens)
        q = rows_of(tokens, heads=Q_HEADS).requires_grad_()
        with pytest.raises(RuntimeError, match=r"query: expected inference.*got a model in training"):
            kv4.hf.kv4_attention(causal_module(training=True), q, key, value, None)
        out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None)
        assert not out.requires_grad
    model = hf_cases.model_of("qwen3")
    model.set_attn_implementation("kv4")
    try:
        logits = model(hf_cases.tokens_of(1, 80), past_key_values=kv4.hf.KV4Cache(model.config)).logits
        assert torch.isfinite(logits).all()
    finally:
        model.set_attn_implementation("eager")


def test_bad_arguments_of_the_cache():
    config = hf_cases.model_of("qwen3").config
    with pytest.raises(ValueError, match="config: expected a transformers PreTrainedConfig; got dict"):
        kv4.hf.KV4Cache({})
    with pytest.raises(ValueError, match=r"recipe: expected a kv4.Recipe or None; got str"):
        kv4.hf.KV4Cache(config, "kv4")
    with pytest.raises(ValueError, match=r"lambda_k: expected one entry per layer \(2\); got 3"):
        kv4.hf.KV4Cache(config, lambda_k=[None] * 3)
    with pytest.raises(ValueError, match=r"lambda_k: expected layer indices 0...1; got 7"):
        kv4.hf.KV4Cache(config, lambda_k={7: torch.ones(2, 32)})
    with pytest.raises(ValueError, match=r"matrix_k\[0\]: expected a matrix; got \[3\]"):
        kv4.hf.KV4Cache(config, matrix_k=torch.ones(3))


def test_given_lambda_and_matrices_reach_their_layers():
    config = hf_cases.model_of("qwen3").config
    given = Recipe(key=Side(mean=True, lambda_="given", rotation="dense"))
    lambdas = [torch.full((KV_HEADS, DIM), 1.0), torch.full((KV_HEADS, DIM), 2.0)]
    cache = kv4.hf.KV4Cache(config, given, lambda_k=lambdas, matrix_k=torch.eye(DIM))
    for index in range(2):
        cache.update(rows_of(2), rows_of(2), index)
        assert torch.equal(torch.tensor(cache.layers[index].core.lambda_(0)), lambdas[index].flatten())
    with pytest.raises(ValueError, match="lambda_k: expected"):
        kv4.hf.KV4Cache(config, given, matrix_k=torch.eye(DIM)).update(rows_of(2), rows_of(2), 0)


# ---- attach


@pytest.fixture
def model():
    model = hf_cases.model_of("qwen3")
    yield model
    kv4.hf.detach(model)


def test_attach(model):
    prompt = {"input_ids": hf_cases.tokens_of(1, 30), "max_new_tokens": 4, "return_dict_in_generate": True}
    assert kv4.hf.attach(model) is model
    assert model.config._attn_implementation == "kv4"
    out = model.generate(**prompt)
    assert isinstance(out.past_key_values, kv4.hf.KV4Cache) and out.past_key_values.recipe == Recipe()
    own = DynamicCache(config=model.config)
    assert model.generate(**prompt, past_key_values=own).past_key_values is own
    assert model.generate(**prompt, use_cache=False).past_key_values is None
    assert type(model.generate(**prompt, cache_implementation="static").past_key_values).__name__ == "StaticCache"
    kv4.hf.attach(model, Recipe.exact())
    assert kv4.hf.new_cache(model).recipe == Recipe.exact()
    assert kv4.hf.new_cache(model, Recipe.paper()).recipe == Recipe.paper()
    twin = copy.deepcopy(model)
    assert isinstance(twin.generate(**prompt).past_key_values, kv4.hf.KV4Cache)
    assert kv4.hf.detach(model) is model
    assert model.config._attn_implementation == "eager"
    assert isinstance(model.generate(**prompt).past_key_values, DynamicCache)
    assert isinstance(kv4.hf.new_cache(model), kv4.hf.KV4Cache)
    kv4.hf.detach(model)


def test_attached_assistants(model):
    """Both models on kv4 caches: the assistant's is cropped at every rejection."""
    assistant = hf_cases.assistant_of(model)
    kv4.hf.attach(model)
    expected = hf_cases.single(model, kv4.hf.new_cache, 200, 24)
    kv4.hf.attach(assistant)
    try:
        got = hf_cases.assisted(model, kv4.hf.new_cache, 200, 24)
    finally:
        kv4.hf.detach(assistant)
    assert torch.equal(got.tokens, expected.tokens)


def refused(model, recipe=None, **kwargs):
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(ValueError) as caught:
        kv4.hf.attach(model, recipe, **kwargs)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before
    assert str(caught.value) == kv4.hf.why_not(model, recipe, **kwargs)
    assert "_prepare_cache_for_generation" not in getattr(model, "__dict__", {})
    return str(caught.value)


def test_attach_says_why_not(model):
    assert refused("gpt2") == "model: expected a transformers PreTrainedModel; got str"
    assert refused(model, "kv4") == "recipe: expected a kv4.Recipe or None; got str"

    t5 = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    assert "T5ForConditionalGeneration, an encoder-decoder model" in refused(
        transformers.T5ForConditionalGeneration(t5)
    )

    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=40, state_size=4)
    message = refused(transformers.MambaForCausalLM(mamba))
    assert message.startswith(
        "model: expected at least one layer of full_attention, sliding_attention, chunked_attention"
    )
    assert message.endswith("got MambaForCausalLM with linear_attention")

    rwkv = transformers.RwkvConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, intermediate_size=32)
    assert refused(transformers.RwkvForCausalLM(rwkv)).endswith("RwkvForCausalLM, which brings its own cache")

    with torch.device("meta"):
        elsewhere = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_hidden_layers=1))
    assert refused(elsewhere) == "model: expected a model on the CPU; got Qwen2ForCausalLM with parameters on meta"

    double = copy.deepcopy(model).double()
    assert "got Qwen3ForCausalLM in torch.float64" in refused(double)


def test_attach_refuses_head_dims_with_the_cores_reason():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    small = transformers.LlamaForCausalLM(config)
    message = refused(small)
    assert message.startswith("recipe: expected one that serves LlamaForCausalLM (head dims 16 and 16, layer 0); got ")
    assert "head_dim_k: expected" in message
    assert kv4.hf.why_not(small, Recipe.exact()) is None


def test_compiled_code_steps_out_of_its_graph():
    """Under torch.compile the cache is a graph break, with the same answers."""

    def step(layer, k, v, q):
        key, value = layer.update(2 * k, v + 1, 0)
        return 3 * kv4.hf.kv4_attention(module, q / 2, key, value, None)[0]

    module, answers = causal_module(), []
    for run in (step, torch.compile(step, backend="eager")):
        layer = KV4Layer(Recipe())
        for tokens in (100, 1, 1):
            out = run(layer, rows_of(tokens), rows_of(tokens, seed=1), rows_of(tokens, heads=Q_HEADS))
        answers.append(out)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-6)


def hybrid():
    """Linear and full attention in turn, as Qwen3-Next and Qwen3.5 have them."""
    config = transformers.Qwen3NextConfig(
        vocab_size=hf_cases.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=0,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM._from_config(config, attn_implementation="eager").eval()


def shared():
    """The last layers read the keys and values of earlier ones."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=hf_cases.VOCAB,
        vocab_size_per_layer_input=hf_cases.VOCAB,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        altup_num_inputs=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 6,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="eager").eval()


def latent():
    """Keys wider than values."""
    config = transformers.DeepseekV3Config(
        vocab_size=hf_cases.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager").eval()


def chunked():
    """Attention within chunks of 16 tokens in three layers of four."""
    config = transformers.Llama4TextConfig(
        vocab_size=hf_cases.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        attention_chunk_size=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager").eval()


def test_latent_attention_dequantises():
    """Multi-head latent attention expands what it reads: any attention is right, none reads packed pages."""
    model = latent()
    assert "which caches latent vectors (a KV4Cache still works with it, dequantising)" in refused(model)
    inputs = hf_cases.left_padded(2, 90)
    expected = hf_cases.generate(model, DynamicCache(config=model.config), inputs, 8, do_sample=False)
    cache = kv4.hf.KV4Cache(model.config, Recipe.exact())
    assert torch.equal(hf_cases.generate(model, cache, inputs, 8, do_sample=False).tokens, expected.tokens)


@pytest.mark.parametrize("build", [hybrid, shared, chunked])
def test_other_families(build):
    model = build()
    inputs = hf_cases.left_padded(2, 90)
    expected = hf_cases.generate(model, DynamicCache(config=model.config), inputs, 8, do_sample=False)
    kv4.hf.attach(model, Recipe.exact())
    got = hf_cases.generate(model, kv4.hf.new_cache(model), inputs, 8, do_sample=False)
    assert torch.equal(got.tokens, expected.tokens)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    kv4.hf.attach(model)
    inputs = hf_cases.left_padded(2, 200)
    assert hf_cases.generate(model, kv4.hf.new_cache(model), inputs, 4, do_sample=False).cache.get_seq_length() == 203
