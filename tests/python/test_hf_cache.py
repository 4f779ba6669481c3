"""KV4Cache: every method of a transformers cache, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

import hf_cases
import kv4.hf
import kv4.hf.handle
from hf_cases import (
    DIM,
    KV_HEADS,
    filled,
    one_thread,  # noqa: F401, a fixture
    rows_of,
)
from kv4 import Recipe, Side
from kv4.hf.cache import KV4Layer
from kv4.hf.device import usable_devices


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


def test_wrong_arguments_are_named(tmp_path):
    model = kv4.hf.attach(copy.deepcopy(hf_cases.model_of("qwen3")))
    cache = kv4.hf.new_cache(model)
    model(hf_cases.tokens_of(2, 90), past_key_values=cache)
    for path in (None, 3, ""):
        for call in (cache.save, lambda path: kv4.hf.KV4Cache.load(path, model.config)):
            with pytest.raises(ValueError, match="path: expected the name of a file; got "):
                call(path)
    with pytest.raises(IsADirectoryError, match=f"path: expected the name of a file; got a folder, {tmp_path}"):
        cache.save(tmp_path)
    for value in ("a", None, 2.5, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="tokens_to_remove: expected a whole number; got "):
            cache.crop(value)
        with pytest.raises(ValueError, match="repeats: expected a whole number; got "):
            cache.batch_repeat_interleave(value)
    for rows in (7, None, [None], torch.tensor([0.5]), [[0]]):
        with pytest.raises(ValueError, match="beam_idx: expected the numbers of rows; got "):
            cache.reorder_cache(rows)
    for given in ("x", object(), b"x"):
        for name in ("lambda_k", "matrix_v"):
            with pytest.raises(ValueError, match=rf"{name}\[0\]: expected a matrix; got {type(given).__name__}"):
                kv4.hf.KV4Cache(model.config, **{name: given})
    for indices in ([5], torch.tensor([-3]), torch.tensor([0.5]), "a", [True] * 3):
        with pytest.raises(IndexError, match="indices: expected integers from -2 to 1, a mask of 2 or a slice; got "):
            cache.batch_select_indices(indices)
    with pytest.raises(ValueError, match="key_states: expected a tensor; got NoneType"):
        cache.update(None, None, 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [90, 90]
    cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 87


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
    assert recording.layers[0].record_past  # what generate() asks by Cache.is_recording_past in newer versions
    for index in range(2):
        recording.update(rows_of(90), rows_of(90), index)
    recording.crop(-60)
    assert [layer.get_seq_length() for layer in recording.layers] == [30, 30]
    recording.layers[0].record_past = False  # as generate() does when it hands the cache back
    assert not recording.layers[0].record_past


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
    assert sliding["shared"] == full["shared"] > 0
    assert sum(row["nbytes"] - row["shared"] for row in cache.describe()) + full["shared"] == cache.nbytes()
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
        (good, good.double(), "value_states: expected float32, float16 or bfloat16; got torch.float64"),
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
        (rows_of(1).to("meta"), rows_of(1), f"key_states: expected a tensor on {usable_devices()}; got meta"),
        (rows_of(1).long(), rows_of(1), "key_states: expected float32, float16 or bfloat16; got torch.int64"),
        (rows_of(1), rows_of(1).double(), "value_states: expected float32, float16 or bfloat16; got torch.float64"),
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
