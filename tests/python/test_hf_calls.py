"""What makes a cache for an attached model makes a KV4Cache: generate(), calls, wrappers, copies, other processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import hf_cases
import kv4.hf
from hf_cases import one_thread, tokens_of  # noqa: F401, a fixture
from kv4 import Recipe
from kv4.hf import KV4Cache


def attached(name: str = "qwen3", recipe: Recipe | None = None, **changes) -> PreTrainedModel:
    return kv4.hf.attach(copy.deepcopy(hf_cases.model_of(name, **changes)), recipe)


def cache_of(model: PreTrainedModel, **options) -> object:
    options = {"input_ids": tokens_of(1, 30), "max_new_tokens": 3, **options}
    return model.generate(**options, return_dict_in_generate=True).past_key_values


@torch.no_grad()
def test_calls_make_kv4_caches():
    """Of the model and of its decoder, with the recipe that attach was given; steps go on with what a call gave."""
    model, ids = attached(recipe=Recipe.exact()), tokens_of(1, 40)
    for called in (model, model.model):
        out = called(ids)
        assert isinstance(out.past_key_values, KV4Cache) and out.past_key_values.recipe == Recipe.exact()
        step = called(ids[:, :1], past_key_values=out.past_key_values)
        assert step.past_key_values is out.past_key_values and step.past_key_values.get_seq_length() == 41
        assert called(ids, use_cache=False).past_key_values is None
    own = DynamicCache(config=model.config)
    assert model(ids, None, None, own).past_key_values is own
    assert isinstance(model(ids, None, None, None).past_key_values, KV4Cache)
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, KV4Cache)
    model.config.use_cache = True
    kv4.hf.detach(model)
    for called in (model, model.model):
        assert type(called(ids).past_key_values) is DynamicCache
        assert not called._forward_pre_hooks and not called._forward_pre_hooks_with_kwargs


def test_training_keeps_the_own_cache_and_its_gradients():
    model, ids = attached(), tokens_of(1, 40)
    plain = hf_cases.model_of("qwen3")
    gradients = []
    for either in (model, copy.deepcopy(plain)):
        either.train()
        out = either(ids, labels=ids)
        assert type(out.past_key_values) is DynamicCache
        out.loss.backward()
        gradients.append(either.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_backward_pass_through_a_kv4_cache_is_refused_and_not_wrong():
    model, ids = attached(), tokens_of(1, 40)
    out = model(ids, labels=ids)
    assert isinstance(out.past_key_values, KV4Cache)
    with pytest.raises(RuntimeError, match=r"got a backward pass: no gradient passes through a KV4Cache \(use_cache"):
        out.loss.backward()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_a_switch_of_rope_scaling_stays_on_kv4(name: str):
    """Past original_max_position_embeddings these models drop their cache and let the next call make one."""
    long = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48}
    half = 16
    settings = {
        **hf_cases._SHARED,
        "hidden_size": 128,
        "sliding_window": None,
        "original_max_position_embeddings": 48,
        "rope_parameters": {**long, "short_factor": [1.0] * half, "long_factor": [2.0] * half},
    }
    if name == "phimoe":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        settings["rope_parameters"] |= {"short_mscale": 1.0, "long_mscale": 1.1}
    prefix = {"phi3": "Phi3", "phimoe": "Phimoe"}[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    prompt = {"input_ids": tokens_of(1, 44), "max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    own = model.generate(**prompt)
    assert type(own.past_key_values) is DynamicCache
    got = kv4.hf.attach(model, Recipe.exact()).generate(**prompt)
    assert torch.equal(got.sequences, own.sequences)
    assert isinstance(got.past_key_values, KV4Cache) and got.past_key_values.recipe == Recipe.exact()


def test_guidance_has_both_its_branches_on_kv4(monkeypatch):
    seen = []
    update = kv4.hf.KV4Layer.update
    monkeypatch.setattr(
        kv4.hf.KV4Layer, "update", lambda self, *a, **k: (seen.append(id(self)), update(self, *a, **k))[1]
    )
    dense = DynamicCache.update
    monkeypatch.setattr(
        DynamicCache, "update", lambda self, *a, **k: (seen.append(type(self)), dense(self, *a, **k))[1]
    )
    model = attached()
    cache = cache_of(model, guidance_scale=1.5, negative_prompt_ids=tokens_of(1, 20, seed=3))
    assert isinstance(cache, KV4Cache)
    assert {kind for kind in seen if isinstance(kind, type)} <= {KV4Cache}
    assert len({layer for layer in seen if isinstance(layer, int)}) == 2 * len(cache.layers)


def test_a_models_own_cache_implementation_is_no_wish_of_the_caller():
    """Gemma 2 as released names one in its generation config; what a call passes still takes precedence."""
    model = copy.deepcopy(hf_cases.model_of("gemma2"))
    model.generation_config.cache_implementation = "hybrid"
    kv4.hf.attach(model)
    assert isinstance(cache_of(model), KV4Cache)
    assert type(cache_of(model, cache_implementation="static")) is transformers.StaticCache


def test_pickled_and_copied_models_are_attached(tmp_path: Path):
    model = attached(recipe=Recipe(sinks=2))
    torch.save(model, tmp_path / "model")
    for twin in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(tmp_path / "model", weights_only=False),
    ):
        assert kv4.hf.new_cache(twin).recipe == Recipe(sinks=2)
        cache = cache_of(twin)
        assert isinstance(cache, KV4Cache) and cache.recipe == Recipe(sinks=2)
        with torch.no_grad():
            assert isinstance(twin.model(tokens_of(1, 8)).past_key_values, KV4Cache)
        kv4.hf.detach(twin)
        assert twin.config._attn_implementation == "eager" and type(cache_of(twin)) is DynamicCache
    assert isinstance(cache_of(model), KV4Cache)


def test_another_process_gets_an_attached_model_and_its_cache(tmp_path: Path):
    """Neither kv4 nor the test is imported there before the pickle is opened."""
    model, ids = attached(), tokens_of(1, 200)
    with torch.no_grad():
        cache = model(ids).past_key_values
        (tmp_path / "both").write_bytes(pickle.dumps((model, cache)))
        expected = model(ids[:, :1], past_key_values=cache).logits
    script = f"""
import pickle, torch
torch.set_num_threads(1)
model, cache = pickle.load(open({str(tmp_path / "both")!r}, "rb"))
ids = torch.tensor({ids[:, :1].tolist()})
with torch.no_grad():
    step = model(ids, past_key_values=cache).logits
    torch.save((step, type(model(ids).past_key_values).__name__), {str(tmp_path / "step")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    step, kind = torch.load(tmp_path / "step")
    assert torch.equal(step, expected) and kind == "KV4Cache"


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.exact(), Recipe.paper()], ids=["kv4", "exact", "paper"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_pickled_cache_goes_on_bit_for_bit(name: str, recipe: Recipe):
    model, inputs = attached(name, recipe), hf_cases.left_padded(2, 150)
    mask, ids = inputs["attention_mask"], tokens_of(2, 90, seed=5)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        cache.activate_past_recording()
        for tokens in (1, 90, 1):
            mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
            twin = pickle.loads(pickle.dumps(cache))
            assert [layer.record_past for layer in twin.layers] == [True, True]
            logits = [model(ids[:, :tokens], attention_mask=mask, past_key_values=x).logits for x in (twin, cache)]
            assert torch.equal(*logits)
        for either in (twin, cache):
            either.crop(-20)
        assert torch.equal(twin.layers[0].keys, cache.layers[0].keys)
    assert not pickle.loads(pickle.dumps(KV4Cache(model.config))).get_seq_length()


def test_a_shallow_copy_of_a_layer_does_not_share_its_core():
    layer, *_ = hf_cases.filled(100)
    twin = copy.copy(layer)
    layer.update(hf_cases.rows_of(1), hf_cases.rows_of(1), 0)
    assert (twin.seen, twin.core.length) == (100, 100)


def test_what_is_saved_of_an_attached_model_is_the_models_own(tmp_path: Path):
    model = copy.deepcopy(hf_cases.model_of("qwen3"))
    model.save_pretrained(tmp_path / "own")
    kv4.hf.attach(model).save_pretrained(tmp_path / "attached")
    own, got = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("own", "attached"))
    assert got == own


def test_kv4_caches_are_growing_caches_to_whoever_asks():
    cache = KV4Cache(hf_cases.model_of("gemma3").config)
    own = DynamicCache(config=hf_cases.model_of("gemma3").config)
    assert isinstance(cache, DynamicCache) and len(cache) == len(own)
    assert (cache.is_compileable, cache.is_croppable) == (own.is_compileable, own.is_croppable)
    for name in ("is_sliding", "is_linear", "is_dummy"):  # older transformers have no is_dummy
        assert getattr(cache, name, None) == getattr(own, name, None)
    assert cache.get_max_length(1) == own.get_max_length(1) == -1
    k, v = hf_cases.rows_of(10), hf_cases.rows_of(10, seed=3)
    for index in range(2):
        cache.update(k, v, index)
    for keys, values, *_ in cache:
        assert torch.equal(keys, k) and torch.equal(values, v)


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements-dev.txt")

    @pytest.mark.parametrize("name", ["qwen3", "gemma3"])
    @pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "LoraConfig"])
    def test_adapters_run_on_kv4(self, peft, kind, name):
        """A prefix's own keys and values, made by peft, go into the cache that generate() made."""
        arguments = (
            {"r": 4, "target_modules": ["q_proj", "v_proj"]} if kind == "LoraConfig" else {"num_virtual_tokens": 9}
        )
        torch.manual_seed(0)
        base = copy.deepcopy(hf_cases.model_of(name))
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)).eval()
        inputs = {**hf_cases.left_padded(2, 80), "max_new_tokens": 6, "return_dict_in_generate": True}
        own = model.generate(**inputs, output_logits=True)
        assert type(own.past_key_values) is DynamicCache
        if kind == "PromptTuningConfig":
            plain = model.generate(**inputs, use_cache=False)
            if not torch.equal(own.sequences, plain.sequences):
                pytest.skip("this peft does not know this transformers: with its own cache the text is another")
        kv4.hf.attach(model.get_base_model(), Recipe.exact())
        got = model.generate(**inputs, output_logits=True)
        assert isinstance(got.past_key_values, KV4Cache)
        assert got.past_key_values.get_seq_length() == own.past_key_values.get_seq_length()
        assert torch.equal(got.sequences, own.sequences)
        for a, b in zip(got.logits, own.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

    def test_attach_names_the_model_within(self, peft):
        model = peft.get_peft_model(
            copy.deepcopy(hf_cases.model_of("qwen3")), peft.LoraConfig(r=4, target_modules=["q_proj"])
        )
        assert kv4.hf.why_not(model) == (
            "model: expected a transformers PreTrainedModel; got PeftModel around one: attach(model.base_model.model)"
        )
        kv4.hf.attach(model.base_model.model)


def test_attach_names_the_model_within_a_wrapper():
    model = copy.deepcopy(hf_cases.model_of("qwen3"))
    expected = "model: expected a transformers PreTrainedModel; got "
    for wrapper, got in (
        (torch.compile(model), "OptimizedModule around one: attach(model._orig_mod)"),
        (torch.nn.DataParallel(model), "DataParallel around one: attach(model.module)"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential"),
        (type("Pipeline", (), {})(), "Pipeline"),
    ):
        assert kv4.hf.why_not(wrapper) == expected + got
    pipeline = type("Pipeline", (), {})()
    pipeline.model = model
    assert kv4.hf.why_not(pipeline) == expected + "Pipeline around one: attach(model.model)"
