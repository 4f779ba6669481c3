"""Tiny random models of mlx-lm's architectures, and the ways of generating that the tests compare."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step

# On any machine; tests/python/test_mlx_gpu.py tests the GPU.
mx.set_default_device(mx.cpu)

VOCABULARY = 211
WINDOW = 70

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_SLIDING = {**_COMMON, "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 3}

# mlx-lm's file: what its ModelArgs are given. gemma2 computes attention by itself, gpt_oss has sinks, and every
# third or fourth layer of gemma3_text, gpt_oss and cohere2 alone sees everything.
MODELS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": {**_COMMON, "hidden_size": 128},
    "qwen3": _COMMON,
    "phi3": {**_COMMON, "hidden_size": 128},
    "olmo2": _COMMON,
    "starcoder2": {**_COMMON, "hidden_size": 128},
    "gemma2": _COMMON,
    "gemma3_text": {**_SLIDING, "num_key_value_heads": 1},
    "cohere2": {**_SLIDING, "hidden_size": 128, "layer_norm_eps": 1e-5},
    "gpt_oss": {
        **_COMMON,
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
    },
}
SLIDING = ("gemma3_text", "cohere2", "gpt_oss")


@functools.cache
def model_of(name: str, dtype: mx.Dtype = mx.float32, **changes: Any) -> Any:
    """The random model, the same at every call."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict({**MODELS[name], "model_type": name, **changes}))
    # Sinks and other zero-initialised parameters would hide mistakes.
    model.apply(lambda x: x + 0.1 * mx.random.normal(x.shape))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def prompt_of(tokens: int, seed: int = 0) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (tokens,), key=mx.random.key(seed))


def greedy(model: Any, prompt: mx.array, new: int, cache: list | None = None, step: int = 2048) -> list[int]:
    """Tokens of greedy decoding; the prompt goes in by calls of `step` tokens."""
    steps = generate_step(prompt, model, max_tokens=new, prompt_cache=cache, prefill_step_size=step)
    return [token for token, _ in steps]


def greedy_batch(model: Any, prompts: list[mx.array], new: list[int], step: int) -> list[list[int]]:
    """Tokens of greedy decoding of ragged prompts side by side, rows leaving as they end."""
    generator = BatchGenerator(model, max_tokens=max(new), prefill_step_size=step, stop_tokens=[])
    uids = generator.insert([p.tolist() for p in prompts], new)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while any(len(tokens[uid]) < n for uid, n in zip(uids, new, strict=True)):
        for response in generator.next()[1]:
            tokens[response.uid].append(response.token)
    generator.close()
    return [tokens[uid] for uid in uids]


def logits_along(model: Any, tokens: mx.array, cache: list, prompt: int) -> mx.array:
    """float32 [T - prompt, vocabulary]: `prompt` tokens in one call, then the rest one by one."""
    parts = [model(tokens[None, :prompt], cache=cache)[:, -1]]
    for i in range(prompt, tokens.size):
        parts.append(model(tokens[None, i : i + 1], cache=cache)[:, -1])
        mx.eval(parts[-1])
    return mx.concatenate(parts[:-1], axis=0).astype(mx.float32)
