"""With Recipe.exact() kv4's cache is mlx-lm's own: the same tokens; with the default recipe batches, drafts and chunks
say what one-by-one decoding of the same calls says."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core", reason="kv4.mlx needs mlx and mlx-lm (pip install kv4[mlx])", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="kv4.mlx needs mlx-lm (pip install kv4[mlx])", exc_type=ImportError)

from mlx_lm.generate import speculative_generate_step  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402

import kv4.mlx  # noqa: E402
from kv4 import Recipe  # noqa: E402
from mlx_cases import (  # noqa: E402
    MODELS,
    SLIDING,
    VOCABULARY,
    WINDOW,
    greedy,
    greedy_batch,
    logits_along,
    model_of,
    prompt_of,
)

NEW = 40


@pytest.mark.parametrize("step", [100, 2048])  # a prompt in chunks, and in one call
@pytest.mark.parametrize("name", MODELS)
def test_exact_gives_the_tokens_of_the_models_own_cache(name, step):
    model, prompt = model_of(name), prompt_of(150)
    own = greedy(model, prompt, NEW, step=step)
    cache = kv4.mlx.make_prompt_cache(model, Recipe.exact())
    assert greedy(model, prompt, NEW, cache, step) == own
    assert all(isinstance(c, kv4.mlx.KV4Cache) for c in cache)
    assert {c.offset for c in cache} == {150 + NEW}
    assert [c.packed for c in cache] == [name != "gemma2"] * len(cache)
    assert any(c.window == WINDOW for c in cache) == (name in SLIDING)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_exact_in_half_precision_is_as_near_to_float32_as_the_models_own_cache(name, dtype):
    """On the CPU MLX rounds scores and weights to a half-precision model's dtype, kv4 keeps float32: tokens may
    differ where logits tie, so both are compared with float32 arithmetic on the same rounded weights."""
    model, tokens = model_of(name, dtype), prompt_of(130)
    own = logits_along(model, tokens, stock.make_prompt_cache(model), 100)
    ours = logits_along(model, tokens, kv4.mlx.make_prompt_cache(model, Recipe.exact()), 100)
    model.set_dtype(mx.float32)
    truth = logits_along(model, tokens, stock.make_prompt_cache(model), 100)
    model.set_dtype(dtype)
    error_own, error_ours = (float(mx.sqrt(mx.square(x - truth).mean())) for x in (own, ours))
    assert 0 < error_ours <= 1.25 * error_own


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_batch_of_ragged_prompts_gives_each_rows_own_tokens(name):
    model = model_of(name)
    lengths, new = (150, 7, 90, 2), [40, 25, 30, 12]
    prompts = [prompt_of(n, seed) for seed, n in enumerate(lengths)]
    own = greedy_batch(model, prompts, new, 100)
    try:
        kv4.mlx.attach(model, Recipe.exact())
        assert greedy_batch(model, prompts, new, 100) == own
        kv4.mlx.attach(model)
        rows = greedy_batch(model, prompts, new, 100)
        assert rows == [greedy(model, p, n, step=100) for p, n in zip(prompts, new, strict=True)]
    finally:
        kv4.mlx.detach(model)
    assert greedy_batch(model, prompts, new, 100) == own


@pytest.mark.parametrize("recipe", [Recipe.exact(), Recipe()], ids=["exact", "default"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(name, recipe):
    """Also past the sliding window, where mlx-lm's own rotating cache cannot be trimmed."""
    model = model_of(name)
    draft = model_of("llama", num_hidden_layers=1)
    prompt = prompt_of(60)
    plain = greedy(model, prompt, 60, kv4.mlx.make_prompt_cache(model, recipe))
    caches = kv4.mlx.make_prompt_cache(model, recipe, record_past=True) + stock.make_prompt_cache(draft)
    steps = list(
        speculative_generate_step(prompt, model, draft, max_tokens=60, prompt_cache=caches, num_draft_tokens=4)
    )
    assert [token for token, *_ in steps] == plain
    if recipe.seal == "never":
        assert plain == greedy(model, prompt, 60)


@pytest.mark.parametrize("recipe", [Recipe.exact(), Recipe()], ids=["exact", "default"])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(("prompt", "drafts", "changes"), [(60, 3, {"rope_theta": 12000.0}), (90, 8, {})])
def test_drafts_are_undone_past_the_window_of_attached_models(name, recipe, prompt, drafts, changes):
    """Of a draft model that is often wrong, and of one that never is. What is kept for it has a bound."""
    model, draft = model_of(name), model_of(name, **changes)
    tokens, new = prompt_of(prompt), 110
    plain = greedy(model, tokens, new, kv4.mlx.make_prompt_cache(model, recipe))
    try:
        for attached in (model, draft):
            kv4.mlx.attach(attached, recipe)
        caches = stock.make_prompt_cache(model) + stock.make_prompt_cache(draft)
        steps = speculative_generate_step(
            tokens, model, draft, max_tokens=new, prompt_cache=caches, num_draft_tokens=drafts
        )
        made, by_draft = zip(*((token, drafted) for token, _, drafted in steps), strict=True)
    finally:
        for attached in (model, draft):
            kv4.mlx.detach(attached)
    assert list(made) == plain
    assert any(by_draft) and (bool(changes) or sum(by_draft) >= new * drafts // (drafts + 1))
    sliding = [c for c in caches if c.window]
    # Whole pages are dropped, below what the oldest token that may be undone sees.
    assert sliding and all(c.offset - c.core.first < WINDOW + 64 + 64 + drafts for c in sliding)
    assert not stock.can_trim_prompt_cache(caches)  # by any number, as mlx-lm's prompt cache asks


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_calls_of_up_to_a_page_answer_as_single_tokens_do(name):
    model, tokens = model_of(name), prompt_of(230)
    outputs = []
    for step in (1, 7, 64):
        cache = kv4.mlx.make_prompt_cache(model)
        parts = [model(tokens[None, i : i + step], cache=cache)[0] for i in range(0, 230, step)]
        outputs.append(mx.concatenate(parts, axis=0))
    scale = float(mx.abs(outputs[0]).max())
    for other in outputs[1:]:
        assert float(mx.abs(other - outputs[0]).max()) <= 2e-3 * scale


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_a_long_call_after_others_is_exact(name):
    """Its own tokens go through MLX, the earlier ones through the core, and the two are merged."""
    model, tokens = model_of(name), prompt_of(260)

    def run(cache):
        return mx.concatenate([model(tokens[None, a:b], cache=cache)[0] for a, b in ((0, 90), (90, 100), (100, 260))])

    own, ours = run(stock.make_prompt_cache(model)), run(kv4.mlx.make_prompt_cache(model, Recipe.exact()))
    assert float(mx.abs(own - ours).max()) <= 1e-4 * float(mx.abs(own).max())


def test_a_batch_of_one_length_needs_no_ragged_cache():
    model = model_of("qwen3")
    tokens = mx.random.randint(0, VOCABULARY, (3, 150), key=mx.random.key(5))
    cache = kv4.mlx.make_prompt_cache(model, Recipe.exact())
    own = model(tokens, cache=stock.make_prompt_cache(model))
    assert mx.allclose(model(tokens, cache=cache), own, atol=1e-4)
    assert cache[0].core.batch == 3
