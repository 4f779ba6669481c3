"""Dtypes that meet in one layer, as under torch.autocast."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_cases
import kv4.hf
from hf_cases import (
    Q_HEADS,
    causal_module,
    one_thread,  # noqa: F401, a fixture
    rows_of,
    softmax_attention,
)
from kv4 import Recipe
from kv4.hf.cache import KV4Layer
from kv4.hf.mask import expand

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# One rounding to a dtype, relative to the number.
HALF_ULP = {F32: 2**-24, F16: 2**-11, BF16: 2**-8}


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize(
    ("key_dtype", "value_dtype", "layer_dtype"),
    [(F32, BF16, F32), (BF16, F32, F32), (F16, BF16, F32), (BF16, BF16, BF16), (F32, F16, F32)],
)
def test_keys_and_values_of_two_dtypes_are_held_in_what_torch_promotes_them_to(
    key_dtype, value_dtype, layer_dtype, tokens
):
    k, v, q = (
        rows_of(tokens, seed=1).to(key_dtype),
        rows_of(tokens, seed=2).to(value_dtype),
        rows_of(tokens, heads=Q_HEADS),
    )
    layer = KV4Layer(Recipe.exact())
    for _ in range(2):
        key, value = layer.update(k, v)
    assert layer.dtype == key.dtype == value.dtype == layer_dtype
    both_k, both_v = (torch.cat([x, x], 2).to(layer_dtype) for x in (k, v))
    assert torch.equal(key.dense(), both_k) and torch.equal(value.dense(), both_v)
    out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None)
    keep = expand(None, None, tokens, 2 * tokens, torch.device("cpu"))
    torch.testing.assert_close(out.double(), softmax_attention(q, both_k, both_v, keep), rtol=0, atol=2e-5)


@pytest.mark.parametrize("later", [F32, F16, BF16])
@pytest.mark.parametrize("first", [F32, F16, BF16])
def test_later_calls_take_the_layers_dtype(first, later):
    """Exactly where it is the wider one; rounded once where it is not, unlike torch.cat, which would widen the rest."""
    layer = KV4Layer(Recipe.exact())
    k, more = rows_of(9, seed=1).to(first), rows_of(4, seed=2).to(later)
    layer.update(k, k)
    for query_dtype in (F32, F16, BF16):
        key, value = layer.update(more, more)
        assert key.dtype == first
        tail = key.dense()[:, :, -4:]
        assert ((tail.double() - more.double()).abs() <= HALF_ULP[first] * more.double().abs()).all()
        q = rows_of(4, heads=Q_HEADS, seed=3).to(query_dtype)
        out, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None)
        assert out.dtype == query_dtype
        keep = expand(None, None, 4, key.shape[2], torch.device("cpu"))
        expected = softmax_attention(q, key.dense(), value.dense(), keep)
        assert ((out.double() - expected).abs() <= HALF_ULP[query_dtype] * expected.abs() + 2e-5).all()
    assert torch.equal(layer.keys[:, :, :9], k)


def test_float64_is_refused_by_name():
    wide = rows_of(3).double()
    layer = KV4Layer(Recipe())
    with pytest.raises(ValueError, match=r"key_states: expected float32, float16 or bfloat16; got torch\.float64"):
        layer.update(wide, wide)
    assert not layer.is_initialized
    layer.update(rows_of(3), rows_of(3))
    for k, v, name in ((wide, rows_of(3), "key_states"), (rows_of(3), wide, "value_states")):
        with pytest.raises(ValueError, match=rf"{name}: expected float32, float16 or bfloat16; got torch\.float64"):
            layer.update(k, v)
    assert layer.get_seq_length() == 3


@torch.no_grad()
def _logits(model, attention, cache, autocast):
    model.set_attn_implementation(attention)
    parts = []
    try:
        with torch.autocast("cpu", BF16, enabled=autocast):
            for ids in hf_cases.tokens_of(2, 112).split([80, 1, 1, 30], 1):
                parts.append(model(ids, past_key_values=cache).logits.float())
    finally:
        model.set_attn_implementation("eager")
    return torch.cat(parts, 1)


@pytest.mark.parametrize("attention", ["kv4", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_model_under_autocast_is_as_on_its_own_cache(name, attention):
    """Keys come in float32 after the rotary embedding and values in bfloat16. The logits are no further from the own
    cache's than autocast moves those from float32."""
    model = hf_cases.model_of(name)
    own, mine = DynamicCache(config=model.config), kv4.hf.KV4Cache(model.config, Recipe.exact())
    expected = _logits(model, "sdpa", own, True)
    found = _logits(model, attention, mine, True)
    plain = _logits(model, "eager", DynamicCache(config=model.config), False)
    assert (found - expected).abs().max() <= (expected - plain).abs().max()
    # Nothing but embeddings and projections has come before the first layer's keys and values.
    window = mine.layers[0].sliding_window
    tokens = slice(-window + 1, None) if window else slice(None)
    for side in ("keys", "values"):
        got, stock = getattr(mine.layers[0], side), getattr(own.layers[0], side)
        # A layer of kv4 has one dtype, the wider; transformers 5.24 keeps values apart, in bfloat16.
        assert got.dtype == torch.promote_types(got.dtype, stock.dtype)
        assert torch.equal(got[:, :, tokens], stock[:, :, tokens].to(got.dtype))


@pytest.mark.parametrize("tokens", [1, 30, 100])
def test_attention_under_autocast_answers_in_its_dtype(tokens):
    layer = KV4Layer(Recipe.exact())
    key, value = layer.update(rows_of(tokens, seed=1), rows_of(tokens, seed=2).to(BF16))
    q = rows_of(tokens, heads=Q_HEADS)
    full, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None)
    with torch.autocast("cpu", BF16):
        half, _ = kv4.hf.kv4_attention(causal_module(), q, key, value, None)
        stock, _ = kv4.hf.kv4_attention(causal_module(), q, key.dense(), value.dense(), None)
    assert half.dtype == stock.dtype == BF16 and full.dtype == F32
    assert torch.equal(half, full.to(BF16))
