"""Layers with a state of their own, beside attention or in its place: served, measured, cropped, saved."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as LAYERS

import causal_models
import hf_cases
import kv4.hf.cache
import kv4.hf.kinds
from hf_cases import one_thread, tokens_of  # noqa: F401, a fixture
from kv4 import Recipe
from kv4.hf import KV4Cache
from kv4.hf.report import tensor_bytes

# Both in one layer; in different layers; a convolution.
BESIDE = ["FalconH1ForCausalLM", "Zamba2ForCausalLM"]
HYBRIDS = [*BESIDE, "BambaForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM"]


@torch.no_grad()
def step(model: PreTrainedModel, cache: KV4Cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("name", BESIDE)
def test_the_attention_half_of_a_layer_with_a_state_is_compressed(name: str):
    model = causal_models.build(name)
    own, cache, ids = DynamicCache(config=model.config), KV4Cache(model.config), tokens_of(1, 500)
    step(model, own, ids)
    kv4.hf.attach(model)
    step(model, cache, ids)
    step(model, cache, ids[:, :1])
    beside = [index for index, layer in enumerate(cache.layers) if isinstance(layer, kv4.hf.cache.KV4HybridLayer)]
    assert beside and cache.is_linear == own.is_linear
    for index in beside:
        layer, dense = cache.layers[index], own.layers[index]
        states = tensor_bytes([layer.conv_states, layer.recurrent_states], set())
        assert states and layer.core.sealed_tokens(0) >= 320
        assert layer.nbytes() == states + layer.core.nbytes()
        assert layer.core.nbytes() < tensor_bytes([dense.keys, dense.values], set()) / 2


@pytest.mark.parametrize("name", BESIDE)
def test_copies_of_layers_with_a_state_are_their_own(name: str):
    model = kv4.hf.attach(causal_models.build(name))
    cache, ids = kv4.hf.new_cache(model), tokens_of(2, 150)
    step(model, cache, ids)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        step(model, copy.deepcopy(twin), ids[:, :3])
        assert torch.equal(step(model, twin, ids[:, :1]), step(model, copy.deepcopy(cache), ids[:, :1]))
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = step(model, copy.deepcopy(cache), ids[:, :1].repeat(2, 1)[:2] * 0 + 5)
    assert torch.equal(logits[0], logits[1])
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    logits = step(model, cache, torch.full((3, 1), 5))
    assert torch.equal(logits[0], logits[2])


def test_a_refused_crop_leaves_layers_with_a_state_as_they_were():
    model = kv4.hf.attach(causal_models.build("FalconH1ForCausalLM"))
    cache, ids = kv4.hf.new_cache(model), tokens_of(1, 100)
    step(model, cache, ids)
    assert not cache.is_croppable
    twin = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-5)
    assert cache.get_seq_length() == 100
    assert torch.equal(step(model, cache, ids[:, :1]), step(model, twin, ids[:, :1]))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.exact()], ids=["kv4", "exact"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_saved_hybrid_goes_on_bit_for_bit(tmp_path: Path, name: str, recipe: Recipe):
    model = kv4.hf.attach(causal_models.build(name), recipe)
    cache, ids = kv4.hf.new_cache(model), tokens_of(2, 150)
    path = tmp_path / "session"
    cache.save(path)
    assert KV4Cache.load(path, model.config).get_seq_length() == 0
    step(model, cache, ids)
    for tokens in (1, 40, 1):
        cache.save(path, seal=False)
        twin = KV4Cache.load(path, model.config)
        assert torch.equal(step(model, twin, ids[:, :tokens]), step(model, cache, ids[:, :tokens]))
        assert twin.nbytes() == pytest.approx(cache.nbytes(), rel=0.1)


def saved_hybrid(tmp_path: Path) -> tuple[PreTrainedModel, bytes]:
    model = kv4.hf.attach(causal_models.build("Qwen3NextForCausalLM"))
    cache = kv4.hf.new_cache(model)
    step(model, cache, tokens_of(1, 80))
    cache.save(tmp_path / "good")
    return model, (tmp_path / "good").read_bytes()


def refused(tmp_path: Path, data: bytes, model: PreTrainedModel) -> str:
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(ValueError, match="expected .*; got ") as raised:
        KV4Cache.load(tmp_path / "other", model.config)
    return str(raised.value)


def test_damaged_and_cut_hybrids_are_refused(tmp_path: Path):
    """Whatever byte of the tensors has changed, wherever the file ends."""
    model, good = saved_hybrid(tmp_path)
    for at in (*range(0, len(good), 211), len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x10
        refused(tmp_path, bytes(bad), model)
    for size in range(0, len(good), 389):
        assert "the file is cut" in refused(tmp_path, good[:size], model)


def test_headers_of_hybrids_that_lie_are_refused(tmp_path: Path):
    from test_hf_saved import with_header

    model, good = saved_hybrid(tmp_path)

    def message(change) -> str:
        return refused(tmp_path, with_header(good, lambda header: change(header["layers"][0]["own"])), model)

    huge = {"tensor": [1 << 39, 64], "dtype": "float32"}
    assert message(lambda own: own.update(conv_states={"dict": [[0, huge]]})).startswith(
        "path: expected 140737488355332 bytes"
    )
    assert message(lambda own: own.update(number_of_states=7)).startswith(
        "layers[0].number_of_states: expected 1; got 7"
    )
    assert message(lambda own: own.update(crop=1)).startswith(
        "layers[0].own: expected attributes of a LinearAttentionLayer; got"
    )
    for value in ({"tensor": [-1], "dtype": "float32"}, {"tensor": [1], "dtype": "int3"}, {"code": []}, [1], {}):
        assert message(lambda own, value=value: own.update(conv_states=value)).startswith(
            "layers[0].conv_states: expected"
        )


def test_a_cut_file_says_how_many_bytes_are_missing(tmp_path: Path):
    model = kv4.hf.attach(copy.deepcopy(hf_cases.model_of("qwen3")))
    cache = kv4.hf.new_cache(model)
    step(model, cache, tokens_of(1, 150))
    cache.save(tmp_path / "session")
    good = (tmp_path / "session").read_bytes()
    assert refused(tmp_path, good[:-3], model).startswith("path: expected ")
    for size in (5, 15, 100, len(good) // 2, len(good) - 3):
        message = refused(tmp_path, good[:size], model)
        start, got = (int(message.split(word)[1].split()[0].strip(";:")) for word in ("after byte", "got "))
        assert start + got == size and message.endswith(f"the file is cut, {tmp_path / 'other'}")


def test_a_cache_that_compresses_nothing_says_so_once():
    """Once for each reason, whatever the caller makes of warnings afterwards."""
    kv4.hf.kinds._warned.clear()
    linear = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40, state_size=4)
    with pytest.warns(
        UserWarning, match="compresses nothing: its layers are linear_attention; kv4 serves full_attention"
    ):
        KV4Cache(linear)
    # Older transformers have one kind of them, by another name.
    kind = next(name for name in ("indexed_attention", "deepseek_sparse_attention") if name in LAYERS)
    indexed = copy.deepcopy(hf_cases.model_of("qwen3").config)
    indexed.layer_types = ["full_attention", kind]
    with pytest.warns(UserWarning, match=f"layers of {kind} keep more than keys and values for every token"):
        KV4Cache(indexed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KV4Cache(linear)
        KV4Cache(indexed)
        KV4Cache(causal_models.build("FalconH1ForCausalLM").config)


def test_a_crop_past_a_window_speaks_of_the_callers_tokens():
    layer, *_ = hf_cases.filled(320, Recipe(sinks=0, window=0), sliding_window=64)
    layer.update(hf_cases.rows_of(1), hf_cases.rows_of(1), 0)
    with pytest.raises(IndexError) as raised:
        layer.crop(-300)
    message = str(raised.value)
    assert message.startswith("tokens_to_remove: expected at least -") and message.endswith("; got -300")
    assert "activate_past_recording()" in message
    most = int(message.split("at least ")[1].split(",")[0])
    with pytest.raises(IndexError):
        layer.crop(most - 1)
    assert layer.seen == 321
    layer.crop(most)
    assert layer.seen == 321 + most
