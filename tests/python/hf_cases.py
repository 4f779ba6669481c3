"""Tiny random models and the ways of calling generate() that every HuggingFace test goes through."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, PreTrainedModel

from kv4 import Recipe
from kv4.hf.cache import KV4Layer

VOCAB = 96
PAD = 0

# Two layers, one of them sliding if the model has sliding layers.
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"hidden_size": 128}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {**_MIXED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**_MIXED, "query_pre_attn_scalar": 24}),
    "llama": ("Llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "phi3": ("Phi3", {"hidden_size": 128, "sliding_window": None}),
    "mistral": ("Mistral", {}),
    "gpt_oss": ("GptOss", {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {"hidden_size": 128, **_EXPERTS}),
}
SLIDING = ("gemma2", "gemma3", "mistral", "gpt_oss")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(name: str, sliding_window: int = 24, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode with eager attention, the same for the same arguments. changes: of its config."""
    prefix, own = MODELS[name]
    settings = {**_SHARED, **own}
    settings |= changes
    if name in SLIDING:
        settings["sliding_window"] = sliding_window
    config_class = getattr(transformers, f"{prefix}Config" if prefix != "Gemma3" else "Gemma3TextConfig")
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class._from_config(config_class(**settings), attn_implementation="eager").eval()
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    model.generation_config.do_sample = False
    model.generation_config.pad_token_id = PAD
    return model


def tokens_of(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def left_padded(batch: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows of decreasing length: row b has b * length / 3 + b pad tokens in front."""
    ids = tokens_of(batch, length, seed)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row * (length // 3) + row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def repetitive(length: int, seed: int = 2) -> torch.Tensor:
    """A prompt in which prompt lookup finds its drafts."""
    phrase = tokens_of(1, 7, seed)
    return phrase.repeat(1, length // 7 + 1)[:, :length]


@dataclasses.dataclass
class Result:
    tokens: torch.Tensor
    logits: list[torch.Tensor]
    cache: Cache


NewCache = Callable[[PreTrainedModel], Cache]
Scenario = Callable[[PreTrainedModel, NewCache, int, int], Result]


def generate(model: PreTrainedModel, cache: Cache, inputs: dict[str, torch.Tensor], new: int, **kwargs: Any) -> Result:
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return Result(out.sequences, list(out.logits), out.past_key_values)


def _plain(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def single(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), _plain(tokens_of(1, length)), new)


def padded_batch(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), left_padded(3, length), new)


def beams(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), _plain(tokens_of(1, length)), new, num_beams=3)


def padded_beams(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), left_padded(2, length), new, num_beams=2)


def prompt_lookup(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), _plain(repetitive(length)), new, prompt_lookup_num_tokens=4)


def assisted(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    """The assistant is the model itself with noise on its weights: right often, not always."""
    return generate(model, new_cache(model), _plain(tokens_of(1, length)), new, assistant_model=assistant_of(model))


@functools.cache
def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    name = next(n for n, (prefix, _) in MODELS.items() if type(model).__name__ == f"{prefix}ForCausalLM")
    window = getattr(model.config, "sliding_window", None) or 24
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model_of(name, window).state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    twin.generation_config.pad_token_id = PAD
    return twin


def chunked_prefill(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    return generate(model, new_cache(model), left_padded(2, length), new, prefill_chunk_size=max(5, length // 3))


def multi_turn(model: PreTrainedModel, new_cache: NewCache, length: int, new: int) -> Result:
    """Two turns on one cache: in the second, row 1's first answer counts as padding, a hole in the middle."""
    cache = new_cache(model)
    first = left_padded(2, length)
    turn = generate(model, cache, first, new)
    # The model has not processed the last generated token yet.
    ids = torch.cat([turn.tokens, tokens_of(2, length // 2, seed=7)], 1)
    mask = torch.ones_like(ids)
    mask[:, :length] = first["attention_mask"]
    mask[1, length + 1 : length + new] = 0
    second = generate(model, cache, {"input_ids": ids, "attention_mask": mask}, new)
    return Result(second.tokens, turn.logits + second.logits, cache)


SCENARIOS: dict[str, Scenario] = {
    "single": single,
    "padded_batch": padded_batch,
    "beams": beams,
    "padded_beams": padded_beams,
    "prompt_lookup": prompt_lookup,
    "assisted": assisted,
    "chunked_prefill": chunked_prefill,
    "multi_turn": multi_turn,
}


# Tensors and the definition of attention, for tests without a model.
KV_HEADS, DIM, Q_HEADS = 2, 32, 4


def rows_of(tokens, batch=2, heads=KV_HEADS, dim=DIM, seed=0):
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def causal_module(training=False):
    module = torch.nn.Module()
    module.is_causal = True
    module.num_key_value_groups = Q_HEADS // KV_HEADS
    return module.train(training)


def filled(tokens, recipe=None, sliding_window=None, batch=2):
    layer = KV4Layer(recipe or Recipe.exact(), sliding_window=sliding_window)
    k, v = rows_of(tokens, batch, seed=1), rows_of(tokens, batch, seed=2)
    return layer, k, v, layer.update(k, v, 0)


def softmax_attention(q, k, v, keep, sinks=None, softcap=None, bias=None):
    """The definition, in float64; a row that sees nothing is 0. [batch, T, q_heads, dim]"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores if bias is None else scores + bias).masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)
