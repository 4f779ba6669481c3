"""With Recipe.exact() a KV4Cache is DynamicCache: the same tokens, logits within 1e-4."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import hf_cases
import kv4.hf
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe

TOLERANCE = 1e-4


def _dynamic(model):
    return DynamicCache(config=model.config)


def _exact(model):
    return kv4.hf.KV4Cache(model.config, Recipe.exact())


def _run(model, attention, scenario, new_cache, length, new):
    model.set_attn_implementation(attention)
    try:
        return hf_cases.SCENARIOS[scenario](model, new_cache, length, new)
    finally:
        model.set_attn_implementation("eager")


@functools.cache
def _reference(name, scenario, length, new):
    return _run(hf_cases.model_of(name), "eager", scenario, _dynamic, length, new)


def _assert_same(result, reference):
    assert torch.equal(result.tokens, reference.tokens)
    assert len(result.logits) == len(reference.logits)
    for got, expected in zip(result.logits, reference.logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


# 21 tokens: everything in one short call. 90 tokens: the prefill kernel, and past the sliding windows of 24.
@pytest.mark.parametrize(("length", "new"), [(21, 12), (90, 8)])
@pytest.mark.parametrize("scenario", list(hf_cases.SCENARIOS))
@pytest.mark.parametrize("name", list(hf_cases.MODELS))
def test_same_as_dynamic_cache(name, scenario, length, new):
    reference = _reference(name, scenario, length, new)
    _assert_same(_run(hf_cases.model_of(name), "kv4", scenario, _exact, length, new), reference)


@pytest.mark.parametrize("scenario", ["single", "padded_batch", "beams", "chunked_prefill", "multi_turn"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "gpt_oss"])
def test_dense_caches_through_the_kv4_attention(name, scenario):
    reference = _reference(name, scenario, 90, 8)
    _assert_same(_run(hf_cases.model_of(name), "kv4", scenario, _dynamic, 90, 8), reference)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scenario", ["single", "padded_batch", "beams", "prompt_lookup", "multi_turn"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mistral"])
def test_dequantising_fallback(name, scenario, attention):
    reference = _reference(name, scenario, 90, 8)
    _assert_same(_run(hf_cases.model_of(name), attention, scenario, _exact, 90, 8), reference)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "gpt_oss"])
def test_without_a_cache(name):
    model = hf_cases.model_of(name)
    inputs = hf_cases.left_padded(2, 40)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        model.set_attn_implementation("kv4")
        try:
            got = model(**inputs, use_cache=False).logits
        finally:
            model.set_attn_implementation("eager")
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss"])
def test_four_dimensional_masks(name, additive):
    """A mask of the caller's own: two documents packed into one row, in a call of two chunks."""
    model = hf_cases.model_of(name, sliding_window=512)
    ids = hf_cases.tokens_of(2, 100)
    document = (torch.arange(100) >= 37).int()
    keep = torch.ones(100, 100).tril().bool() & (document[:, None] == document[None])
    mask = keep.expand(2, 1, 100, 100)
    eager = torch.zeros(2, 1, 100, 100).masked_fill(~mask, torch.finfo(torch.float32).min)

    def logits(attention, cache, mask):
        model.set_attn_implementation(attention)
        try:
            with torch.no_grad():
                first = model(ids[:, :80], attention_mask=mask[:, :, :80, :80], past_key_values=cache).logits
                second = model(ids[:, 80:], attention_mask=mask[:, :, 80:], past_key_values=cache).logits
            return torch.cat([first, second], 1)
        finally:
            model.set_attn_implementation("eager")

    expected = logits("eager", _dynamic(model), eager)
    got = logits("kv4", _exact(model), eager if additive else mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Half-precision models run; against their own DynamicCache within a few ulps of the logits' size."""
    model = hf_cases.model_of("qwen3", seed=3).to(dtype)
    ids = hf_cases.tokens_of(1, 80)
    try:
        with torch.no_grad():
            cache = _dynamic(model)
            expected = model(ids, past_key_values=cache).logits.float()
            model.set_attn_implementation("kv4")
            cache = _exact(model)
            got = model(ids, past_key_values=cache).logits.float()
            assert cache.layers[0].dtype == dtype
            step = model(ids[:, -1:], past_key_values=cache).logits
            assert torch.isfinite(step).all()
    finally:
        model.set_attn_implementation("eager")
        model.to(torch.float32)
    # Two layers of attention and MLP round a dozen times on the way to the logits.
    ulp = torch.finfo(dtype).eps * expected.abs().max()
    assert (got - expected).abs().max() <= 12 * ulp


def test_prefix_reuse_by_deepcopy():
    import copy

    model = hf_cases.model_of("gemma3")
    prefix, rest = hf_cases.tokens_of(1, 80), [hf_cases.tokens_of(1, n, seed=n) for n in (3, 70)]
    model.set_attn_implementation("kv4")
    try:
        with torch.no_grad():
            shared = _exact(model)
            model(prefix, past_key_values=shared)
            for ids in rest:
                got = model(ids, past_key_values=copy.deepcopy(shared)).logits
                expected = model(torch.cat([prefix, ids], 1), use_cache=False).logits[:, 80:]
                torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
                assert shared.get_seq_length() == 80
    finally:
        model.set_attn_implementation("eager")
