"""The kv4 attention on handles and dense tensors, handles as tensors, and masks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import hf_cases
import kv4.hf
import kv4.hf.handle
from hf_cases import (
    KV_HEADS,
    Q_HEADS,
    causal_module,
    filled,
    one_thread,  # noqa: F401, a fixture
    rows_of,
    softmax_attention,
)
from kv4 import Recipe, Side
from kv4.hf.cache import KV4Layer
from kv4.hf.mask import Pattern, expand, limits_of

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
        return mask, expand(*limits_of(mask.clone())[:2], tokens, columns, torch.device("cpu")), None
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
    # Also over dense tensors: no cache, cross-attention, another cache.
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
        assert type(mask) is Pattern
        out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, mask)
        expected = softmax_attention(q, key.dense(), value.dense(), sdpa_mask(*place, allow_is_causal_skip=False))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_bidirectional_attention_over_a_cache():
    _, k, v, (key, value) = filled(80)
    q = rows_of(80, heads=Q_HEADS)
    out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None, is_causal=False)
    expected = softmax_attention(q, k, v, torch.ones(1, 1, 80, 80, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_a_window_is_the_masks_and_not_an_arguments():
    """As in torch's attention, which reads the mask alone."""
    _, k, v, (key, value) = filled(50)
    q = rows_of(50, heads=Q_HEADS)
    expected = softmax_attention(q, k, v, expand(None, None, 50, 50, torch.device("cpu")))
    for pair in ((key, value), (k, v)):
        out, _ = kv4.hf.kv4_attention(causal_module(), q, *pair, None, sliding_window=7)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


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
    with pytest.raises(ValueError, match="value: expected the handle of the same layer and update"):
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
        with pytest.raises(RuntimeError, match=r"query: expected inference; got a backward pass"):
            out.sum().backward()
        with torch.no_grad():
            assert not kv4.hf.kv4_attention(causal_module(), q, key, value, None)[0].requires_grad
    model = hf_cases.model_of("qwen3")
    model.set_attn_implementation("kv4")
    try:
        logits = model(hf_cases.tokens_of(1, 80), past_key_values=kv4.hf.KV4Cache(model.config)).logits
        assert torch.isfinite(logits).all()
    finally:
        model.set_attn_implementation("eager")


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


def mask(q, kv, q_offset, kv_offset=0, function=causal_mask_function, padding=None, batch=2, **kwargs):
    return kv4.hf.kv4_mask(batch, q, kv, q_offset, kv_offset, function, padding, **kwargs)


def test_compact_masks():
    def said(x):
        return (x.causal, None if x.start is None else x.start.tolist(), x.window)

    window = sliding_window_causal_mask_function(10)
    assert mask(1, 40, 39) is None  # one query that sees all
    assert said(mask(5, 5, 0)) == (True, None, 0)
    assert said(mask(5, 8, 3, function=window)) == (True, None, 0)  # the window hides nothing yet
    assert said(mask(1, 40, 39, function=window)) == (True, None, 10)
    padding = torch.ones(2, 40, dtype=torch.bool)
    assert said(mask(40, 40, 0, padding=padding)) == (True, None, 0)
    padding[1, :7] = False
    assert said(mask(40, 40, 0, padding=padding)) == (True, [0, 7], 0)
    assert said(mask(40, 40, 0, padding=padding.long())) == (True, [0, 7], 0)
    # A sliding layer's columns begin at position 5: two of row 1's padding tokens are left.
    assert said(mask(1, 35, 39, 5, window, padding)) == (True, [0, 2], 10)
    open_ = {
        "function": bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
    }
    assert said(mask(40, 40, 0, padding=padding, **open_)) == (False, [0, 7], 0)
    padding[1] = False
    assert said(mask(1, 40, 39, padding=padding)) == (True, [0, 40], 0)


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
    assert torch.equal(got & True, expected)  # as anything but kv4 reads it


def test_a_mask_that_must_be_dense_is():
    assert type(mask(5, 5, 0, allow_is_causal_skip=False)) is torch.Tensor


def test_a_pattern_is_a_mask_to_everyone_else():
    """Models slice masks, flip them, and add to them."""
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, :4] = False
    function = sliding_window_causal_mask_function(3)
    expected = sdpa_mask(2, 5, 12, 7, 0, function, padding, allow_is_causal_skip=False)
    got = mask(5, 12, 7, 0, function, padding)
    assert type(got) is Pattern and got.shape == expected.shape and got.dtype == torch.bool
    assert torch.equal(got[:, :, -2:], expected[:, :, -2:])
    assert torch.equal(got.flip(-1), expected.flip(-1))
    assert torch.equal(torch.where(got, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert torch.equal(got.to(torch.float32), expected.to(torch.float32))
    assert torch.equal(got.clone(), expected) and torch.equal(copy.deepcopy(got), expected)
    moved = got.to("meta")
    assert type(moved) is Pattern and moved.device.type == "meta" and moved.window == 3
