"""The default recipe under generate(): prompts long enough that pages seal, windows long enough to hold pages."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_cases
import kv4.hf
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe, Side

# Pages seal at 4 + 64 + 64 n tokens: three by the end of the prompt, one more (at 324) while decoding.
LENGTH, NEW = 300, 32
WINDOW = 150


@pytest.fixture
def attached():
    """Attaches models by name, and detaches them after the test."""
    models = []

    def attach(name, recipe=None):
        model = kv4.hf.attach(hf_cases.model_of(name, WINDOW), recipe)
        models.append(model)
        return model

    yield attach
    for model in models:
        kv4.hf.detach(model)


def _sealed(cache):
    return max(max(layer.core.sealed_tokens(b) for b in range(layer.batch)) for layer in cache.packed_layers())


@pytest.mark.parametrize("scenario", ["padded_batch", "padded_beams", "chunked_prefill", "multi_turn"])
@pytest.mark.parametrize("name", list(hf_cases.MODELS))
def test_scenario_runs(name, scenario, attached):
    result = hf_cases.SCENARIOS[scenario](attached(name), kv4.hf.new_cache, LENGTH, 12)
    assert _sealed(result.cache) >= 64
    assert all(torch.isfinite(step).all() for step in result.logits)


@pytest.mark.parametrize("name", list(hf_cases.MODELS))
def test_speculation_gives_the_text_of_one_by_one_decoding(name, attached):
    model = attached(name)
    expected = hf_cases.single(model, kv4.hf.new_cache, LENGTH, NEW)
    assert _sealed(expected.cache) >= (128 if name == "mistral" else 192)
    got = hf_cases.assisted(model, kv4.hf.new_cache, LENGTH, NEW)
    assert torch.equal(got.tokens, expected.tokens)

    prompt = hf_cases.repetitive(LENGTH)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    expected = hf_cases.generate(model, kv4.hf.new_cache(model), inputs, NEW)
    got = hf_cases.prompt_lookup(model, kv4.hf.new_cache, LENGTH, NEW)
    assert torch.equal(got.tokens, expected.tokens)


@pytest.mark.parametrize("name", list(hf_cases.MODELS))
def test_beam_scores_are_those_of_one_by_one_decoding(name, attached):
    """The returned beam, fed token by token through a fresh cache, has the score that beam search gave it."""
    model, beams = attached(name), 3
    inputs = hf_cases.left_padded(2, LENGTH)
    out = model.generate(
        **inputs,
        num_beams=beams,
        max_new_tokens=NEW,
        length_penalty=1.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert isinstance(out.past_key_values, kv4.hf.KV4Cache)
    # The same batch shape as in the search, so that the model's own matrix products round alike.
    tokens = out.sequences.repeat_interleave(beams, 0)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.long)], 1).repeat_interleave(beams, 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, total = kv4.hf.new_cache(model), torch.zeros(2 * beams)
    with torch.no_grad():
        step = slice(0, LENGTH)
        for t in range(LENGTH, LENGTH + NEW):
            logits = model(
                tokens[:, step],
                attention_mask=mask[:, :t],
                position_ids=positions[:, step],
                past_key_values=cache,
            ).logits[:, -1]
            total += torch.log_softmax(logits, -1).gather(1, tokens[:, t : t + 1])[:, 0]
            step = slice(t, t + 1)
    # NEW float32 log-probabilities of size up to log(VOCAB), each from logits that round at 2^-24.
    torch.testing.assert_close(total[::beams] / NEW, out.sequences_scores, rtol=0, atol=1e-5)


def test_short_calls_see_what_single_tokens_would(attached):
    """Any split of the decoded tokens into short calls, with rejected drafts cropped, gives the same logits."""
    model = attached("qwen3")
    ids = hf_cases.tokens_of(1, LENGTH + 60)
    rejected = hf_cases.tokens_of(1, 9, seed=11)

    def run(sizes, drafts):
        cache, logits, at = kv4.hf.new_cache(model), [], LENGTH
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids[:, :LENGTH], past_key_values=cache)
            for size in sizes:
                call = ids[:, at : at + size]
                if drafts:
                    call = torch.cat([call, rejected], 1)
                logits.append(model(call, past_key_values=cache).logits[:, :size])
                cache.crop(-rejected.shape[1] if drafts else 0)
                at += size
        assert cache.get_seq_length() == at
        return torch.cat(logits, 1)

    expected = run([1] * 60, drafts=False)
    for sizes, drafts in (([7] * 8 + [4], False), ([1] * 60, True), ([20, 3, 30, 7], True)):
        torch.testing.assert_close(run(sizes, drafts), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss"])
def test_close_to_the_exact_cache(name, attached):
    """Not a quality bound (random keys are the hardest): it catches a layout or position that is wrong."""
    model = attached(name)
    ids = hf_cases.tokens_of(1, LENGTH + NEW)
    logits = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), kv4.hf.new_cache(model)):
            model(ids[:, :LENGTH], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits[0, 0] for t in range(LENGTH, LENGTH + NEW)]
            logits.append(torch.stack(steps))
    exact, sealed = logits
    assert not torch.equal(exact, sealed)
    # Logits that had nothing to do with each other would be sqrt(2) apart.
    assert (sealed - exact).norm() <= 0.25 * exact.norm()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_dequantising_fallback_agrees(name, attached):
    """attn_implementation="sdpa" on the same cache, where lambda does not depend on who attends."""
    recipe = Recipe(key=Side(mean=True))
    model = attached(name, recipe)
    ids = hf_cases.tokens_of(1, LENGTH + NEW)
    logits = []
    with torch.no_grad():
        for attention in ("kv4", "sdpa"):
            model.set_attn_implementation(attention)
            cache = kv4.hf.new_cache(model)
            model(ids[:, :LENGTH], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits[0, 0] for t in range(LENGTH, LENGTH + NEW)]
            assert _sealed(cache) >= 192
            logits.append(torch.stack(steps))
    # The fused kernel is within 1e-3 of attention over the dequantised cache; two layers.
    assert (logits[0] - logits[1]).norm() <= 2e-3 * logits[1].norm()


def test_prefix_reuse_by_deepcopy(attached):
    model = attached("gemma3")
    prefix, rest = hf_cases.tokens_of(1, LENGTH), hf_cases.tokens_of(1, 60, seed=3)

    def continued(cache):
        with torch.no_grad():
            return torch.cat([model(rest[:, t : t + 1], past_key_values=cache).logits for t in range(60)], 1)

    shared, own = kv4.hf.new_cache(model), kv4.hf.new_cache(model)
    with torch.no_grad():
        model(prefix, past_key_values=shared)
        model(prefix, past_key_values=own)
    expected = continued(own)
    assert torch.equal(continued(copy.deepcopy(shared)), expected)
    assert shared.get_seq_length() == LENGTH
    assert torch.equal(continued(shared), expected)


@pytest.mark.parametrize(
    "recipe", [Recipe.paper(), Recipe(sinks=0, window=0), Recipe(key=Side(rotation="srht", group=32))]
)
def test_other_recipes_run(recipe, attached):
    model = attached("qwen3", recipe)
    for scenario in ("padded_batch", "beams", "prompt_lookup", "chunked_prefill"):
        result = hf_cases.SCENARIOS[scenario](model, kv4.hf.new_cache, 150, 8)
        assert all(torch.isfinite(step).all() for step in result.logits)
        assert _sealed(result.cache) >= 64


def test_padding_may_hold_anything(attached):
    """A pad embedding of NaN: nothing of it reaches a real token, at prefill or later."""
    model = attached("qwen3")
    inputs = hf_cases.left_padded(3, LENGTH)
    expected = hf_cases.generate(model, kv4.hf.new_cache(model), inputs, 8)
    weight = model.get_input_embeddings().weight
    row = weight[hf_cases.PAD].clone()
    try:
        with torch.no_grad():
            weight[hf_cases.PAD] = float("nan")
        got = hf_cases.generate(model, kv4.hf.new_cache(model), inputs, 8)
    finally:
        with torch.no_grad():
            weight[hf_cases.PAD] = row
    assert torch.equal(got.tokens, expected.tokens)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.exact()])
def test_a_sliding_window_evicts(recipe, attached):
    model = attached("mistral", recipe)  # every layer slides, by 150 tokens
    cache, bytes_at = kv4.hf.new_cache(model), {}
    ids = hf_cases.tokens_of(1, 900)
    with torch.no_grad():
        for t in range(0, 900, 30):
            model(ids[:, t : t + 30], past_key_values=cache)
            bytes_at[t + 30] = cache.nbytes()
    layer = cache.layers[0]
    assert layer.get_seq_length() == 900
    assert 900 - WINDOW - 64 - 30 <= layer.core.first <= 900 - WINDOW + 1
    assert bytes_at[900] <= bytes_at[300]
    dense = 2 * 900 * sum(x.kv_heads * x.head_dim_k for x in cache.packed_layers()) * 4
    assert cache.nbytes() < 0.5 * dense
