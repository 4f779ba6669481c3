"""attach: what it changes, the model families it serves, and why it refuses others."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import hf_cases
import kv4.hf
import kv4.hf.handle
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe
from kv4.hf.device import usable_devices


@pytest.fixture
def model():
    model = hf_cases.model_of("qwen3")
    model.set_attn_implementation("eager")  # other files' tests have the same model, and may leave another
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
    expected = f"model: expected a model on {usable_devices()}; got Qwen2ForCausalLM with parameters on meta"
    assert refused(elsewhere) == expected

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
