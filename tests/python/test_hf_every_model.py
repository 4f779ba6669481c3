"""Every causal language model class of transformers, tiny and random, under Recipe.exact() against its own cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Cache, PreTrainedModel

import causal_models
import kv4.hf
from hf_cases import left_padded, one_thread, tokens_of  # noqa: F401, a fixture
from kv4 import Recipe

pytestmark = pytest.mark.slow

# Sums in another order differ by a few ulps of float32 in every layer; logits of these models are of size 1 to 30.
TOLERANCE = 1e-4

ATTACHED = "attached"
BYPASSES = "by hand: model: expected a model built on transformers' attention interface"
LATENT = "by hand: model: expected attention that reads keys and values from the cache"
OTHER_LAYERS = "by hand: model: expected at least one layer of full_attention"
NO_BEAMS = "fails on its own cache: ValueError: {} cannot use beam search with a cache currently"

# What each class that attach does not serve, or not to the same logits, answers with; the reason stands above it.
NAMED = {
    # They compute attention themselves, some of them with terms that the interface does not know: a KV4Cache that is
    # passed to them gives their own logits, dequantising.
    **dict.fromkeys(
        (
            "BigBirdForCausalLM",
            "BloomForCausalLM",
            "CodeGenForCausalLM",
            "CpmAntForCausalLM",
            "FalconForCausalLM",
            "GPTJForCausalLM",
            "GPTNeoForCausalLM",
            "GPTNeoXJapaneseForCausalLM",
            "GitForCausalLM",
            "Inkling2ForCausalLM",
            "MegatronBertForCausalLM",
            "MptForCausalLM",
            "MvpForCausalLM",
            "RemBertForCausalLM",
            "RoFormerForCausalLM",
            "TrOCRForCausalLM",
            "XGLMForCausalLM",
        ),
        BYPASSES,
    ),
    # Multi-head latent attention expands what it reads from the cache.
    **dict.fromkeys(
        (
            "AXK1ForCausalLM",
            "BailingHybridForCausalLM",
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "Dots3NoteForCausalLM",
            "Glm4MoeLiteForCausalLM",
            "KimiLinearForCausalLM",
            "LongcatFlashForCausalLM",
            "MiniCPM3ForCausalLM",
            "YoutuForCausalLM",
        ),
        LATENT,
    ),
    # Their layers keep an indexer's keys, or blocks compressed by the model itself, beside keys and values.
    **dict.fromkeys(
        (
            "AXK2ForCausalLM",
            "DeepseekV32ForCausalLM",
            "DeepseekV4ForCausalLM",
            "GlmMoeDsaForCausalLM",
            "HYV4ForCausalLM",
            "Qwen4ExpForCausalLM",
        ),
        OTHER_LAYERS,
    ),
    # Rows of padding see nothing: eager attention averages there, sdpa and kv4 answer 0, and recurrence carries it on.
    "RecurrentGemmaForCausalLM": "as under sdpa",
    # A state and no attention; their beams cannot be reordered.
    **{
        name: NO_BEAMS.format(name)
        for name in (
            "FalconMambaForCausalLM",
            "Mamba2ForCausalLM",
            "MambaForCausalLM",
            "RwkvForCausalLM",
            "xLSTMForCausalLM",
        )
    },
    # They bring a cache of their own, or none.
    "MiniMaxForCausalLM": "fails by hand: ValueError: MiniMax uses cache of its own",
    "OpenAIGPTLMHeadModel": "fails on its own cache: ValueError: The following `model_kwargs` are not used",
    "ReformerModelWithLMHead": "fails on its own cache: AttributeError: 'ReformerDynamicCache' object has no attribute",
    "XLMWithLMHeadModel": "fails on its own cache: ValueError: The following `model_kwargs` are not used",
    "XLNetLMHeadModel": "fails on its own cache: ValueError: Passing a tuple of `past_key_values` is not supported",
    # They take one token at a time, or codes of an encoder, from their generate().
    "MusicgenForCausalLM": "fails on its own cache: TypeError: unsupported operand type(s) for *",
    "MusicgenMelodyForCausalLM": "fails on its own cache: TypeError: unsupported operand type(s) for *",
    "ProphetNetForCausalLM": "fails on its own cache: AssertionError: At the moment `use_cache` is only supported",
    # Four models in one, of bytes; two that read the keys and values of another model's layers.
    "BltForCausalLM": "not built: ValueError: name: expected a model of at most",
    "Gemma4AssistantForCausalLM": "not built: StrictDataclassClassValidationError",
    "Gemma4UnifiedAssistantForCausalLM": "not built: ValueError: The set of layer types producing a cache",
}


@dataclasses.dataclass
class Outputs:
    tokens: list[torch.Tensor]
    logits: list[torch.Tensor]
    cache: Cache


def outputs_of(model: PreTrainedModel, by_hand: bool) -> Outputs:
    """Two turns of a padded batch on one cache, the second past the sliding windows; then beams."""
    length, new = 30, 6
    first = left_padded(2, length)

    def run(inputs: dict[str, torch.Tensor], cache: Cache | None, **options: int) -> object:
        cache = kv4.hf.KV4Cache(model.config, Recipe.exact()) if by_hand and cache is None else cache
        return model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    one = run(first, None)
    ids = torch.cat([one.sequences, tokens_of(2, 70, seed=7)], 1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, ids.shape[1] - length), value=1)
    two = run({"input_ids": ids, "attention_mask": mask}, one.past_key_values)
    beams = run(first, None, num_beams=2)
    return Outputs(
        [one.sequences, two.sequences, beams.sequences],
        [*one.logits, *two.logits, *beams.logits],
        two.past_key_values,
    )


def outcome(name: str) -> str:
    try:
        model = causal_models.build(name)
    except Exception as error:
        return f"not built: {type(error).__name__}: {error}"
    try:
        own = outputs_of(model, by_hand=False)
    except Exception as error:
        return f"fails on its own cache: {type(error).__name__}: {error}"
    reason = kv4.hf.why_not(model, Recipe.exact())
    try:
        if reason is None:
            kv4.hf.attach(model, Recipe.exact())
        got = outputs_of(model, by_hand=reason is not None)
    except Exception as error:
        return f"fails{'' if reason is None else ' by hand'}: {type(error).__name__}: {error}"
    if not isinstance(got.cache, kv4.hf.KV4Cache):
        return f"runs on {type(got.cache).__name__}"
    if (difference := difference_of(got, own)) is None:
        return ATTACHED if reason is None else f"by hand: {reason}"
    kv4.hf.detach(model)
    if reason is None and model.config._attn_implementation == "eager" and type(model)._supports_sdpa:
        model.set_attn_implementation("sdpa")
        if difference_of(got, outputs_of(model, by_hand=False)) is None:
            return "as under sdpa"
    return difference


def difference_of(got: Outputs, own: Outputs) -> str | None:
    for run, (a, b) in enumerate(zip(got.tokens, own.tokens, strict=True)):
        if not torch.equal(a, b):
            return f"other tokens in run {run}"
    size = max(1.0, *(float(x[torch.isfinite(x)].abs().max()) for x in own.logits))
    worst = 0.0
    for a, b in zip(got.logits, own.logits, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return "logits that are not finite elsewhere"
        worst = max(worst, float((a - b)[finite].abs().max()))
    return None if worst <= TOLERANCE * size else f"logits differ by {worst:.1e} of {size:.1e}"


@pytest.mark.parametrize("name", sorted({*causal_models.names(), *NAMED}))
def test_every_model_gives_its_own_tokens_and_logits_or_is_named(name: str):
    assert outcome(name).startswith(NAMED.get(name, ATTACHED))


def test_most_models_are_served():
    """A change of transformers' classes, or of the table, that leaves few of them is seen."""
    assert len(set(causal_models.names()) - set(NAMED)) >= 120
