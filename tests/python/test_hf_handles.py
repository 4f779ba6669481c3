"""Handles keep the values of their update, whatever becomes of the cache; models that share keys and values."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import hf_cases
import kv4.hf
from hf_cases import (
    Q_HEADS,
    causal_module,
    filled,
    one_thread,  # noqa: F401, a fixture
    rows_of,
)
from kv4 import Recipe
from kv4.hf import ops

CHANGES = {
    "another token": lambda layer: layer.update(rows_of(1), rows_of(1)),
    "another chunk": lambda layer: layer.update(rows_of(150), rows_of(150)),
    "no tokens": lambda layer: layer.update(rows_of(0), rows_of(0)),
    "compiled": lambda layer: ops.append(layer.state, rows_of(1), rows_of(1), layer.number),
    "crop of the last call": lambda layer: layer.crop(-1),
    "crop into pages": lambda layer: layer.crop(-60),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "reset": lambda layer: layer.reset(),
    "many": lambda layer: [layer.update(rows_of(70, seed=s), rows_of(70, seed=s)) for s in range(3)],
}


def stepped(recipe: Recipe, window: int | None, tokens: int, kept: bool) -> tuple[Any, Any, Any]:
    """A layer after a prompt of 200 and a call of `tokens`, and that call's handles."""
    layer, *_ = filled(200, recipe, window)
    if window and kept:
        layer.activate_past_recording()  # so that it may be cropped
    return layer, *layer.update(rows_of(tokens, seed=5), rows_of(tokens, seed=6))


@pytest.mark.parametrize("tokens", [1, 30, 100])
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize(
    ("recipe", "window"), [(Recipe(), None), (Recipe.exact(), None), (Recipe(), 90), (Recipe.paper(), None)]
)
def test_a_handle_outlives_changes_of_its_cache(recipe, window, change, tokens):
    q = rows_of(tokens, heads=Q_HEADS, seed=7)
    record = "crop" in change
    _, key, value = stepped(recipe, window, tokens, record)
    expected = kv4.hf.kv4_attention(causal_module(), q, key, value, None)[0], key.dense(), value.dense()
    layer, key, value = stepped(recipe, window, tokens, record)
    before = key.shape, key.offset, key.dtype, key.device
    CHANGES[change](layer)
    assert (key.shape, key.offset, key.dtype, key.device) == before
    assert torch.equal(kv4.hf.kv4_attention(causal_module(), q, key, value, None)[0], expected[0])
    assert torch.equal(key.dense(), expected[1]) and torch.equal(value + 0, expected[2])


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "reset"])
def test_old_handles_and_those_who_keep_them_leave_the_cache_alone(change):
    """What an old handle is asked, and that it is there, changes nothing: not lambda, which learns from queries."""
    q = rows_of(40, heads=Q_HEADS, seed=7)
    states = []
    for keep in (False, True):
        layer, *_ = filled(90, Recipe())
        handles = layer.update(rows_of(40, seed=5), rows_of(40, seed=6))
        kv4.hf.kv4_attention(causal_module(), q, *handles, None)
        if not keep:
            del handles
        CHANGES[change](layer)
        if keep:
            kv4.hf.kv4_attention(causal_module(), 3 * q, *handles, None)
        newer = layer.update(rows_of(1, layer.batch, seed=8), rows_of(1, layer.batch, seed=8))
        out, _ = kv4.hf.kv4_attention(causal_module(), rows_of(1, layer.batch, Q_HEADS), *newer, None)
        for _ in range(130):
            layer.update(rows_of(1, layer.batch, seed=8), rows_of(1, layer.batch, seed=8))
        states.append((out, layer.keys, layer.values, layer.core.lambda_(0)))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Counting:
    """A core that counts its clones."""

    def __init__(self, core: Any) -> None:
        self.core, self.clones = core, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def clone(self) -> Any:
        self.clones += 1
        return self.core.clone()


def test_nothing_is_cloned_while_nobody_keeps_a_handle():
    layer, *_ = filled(90, Recipe())
    layer.core = counting = Counting(layer.core)
    for _ in range(3):
        key, value = layer.update(rows_of(1), rows_of(1))
        kv4.hf.kv4_attention(causal_module(), rows_of(1, heads=Q_HEADS), key, value, None)
        del key, value
        layer.crop(-1)
    assert counting.clones == 0
    key, _ = layer.update(rows_of(1), rows_of(1))
    layer.crop(-1)
    layer.update(rows_of(1), rows_of(1))
    assert counting.clones == 1 and key.shape[2] == 91


def test_a_refused_change_leaves_handle_and_cache_together():
    layer, *_ = filled(90, Recipe())
    key, _ = layer.update(rows_of(1), rows_of(1))
    for refused in (
        lambda: layer.update(rows_of(1, dim=16), rows_of(1)),
        lambda: layer.reorder_cache(torch.tensor([9])),
        lambda: layer.crop(-500),
    ):
        with pytest.raises((ValueError, IndexError)):
            refused()
        assert key.held.core is layer.core


def test_copies_of_a_handle_are_tensors_of_their_own():
    layer, k, _, (key, _) = filled(90)
    for copied in (copy.deepcopy(key), copy.copy(key)):
        assert type(copied) is torch.Tensor and torch.equal(copied, k)
    file = io.BytesIO()
    torch.save({"key": key}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["key"], k)
    twin = copy.deepcopy(layer)
    twin.crop(-1)
    assert key.held.core is layer.core and torch.equal(key.dense(), k)


def test_handles_of_two_updates_do_not_mix():
    layer, _, _, (key, _) = filled(20)
    _, value = layer.update(rows_of(1), rows_of(1))
    with pytest.raises(ValueError, match="value: expected the handle of the same layer and update as key's"):
        kv4.hf.kv4_attention(causal_module(), rows_of(1, heads=Q_HEADS), key, value, None)


def test_a_captured_step_that_never_ran_has_no_values():
    layer, *_ = filled(90)
    key, value = layer.update(rows_of(1), rows_of(1))
    layer.disown()
    with pytest.raises(RuntimeError, match="handle: expected one of a step that ran; got one of a step captured"):
        key.dense()
    with pytest.raises(RuntimeError, match="handle: expected one of a step that ran"):
        kv4.hf.kv4_attention(causal_module(), rows_of(1, heads=Q_HEADS), key, value, None)


# Models whose later layers read the keys and values of earlier ones.
_TEXT = {
    "vocab_size": hf_cases.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.15,
    "pad_token_id": hf_cases.PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": 24,
    "max_position_embeddings": 512,
}
_FIVE = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": hf_cases.VOCAB,
}
_ONLY_SHARED = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "global_head_dim": 64,
}


def sharing_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if name == "gemma3n":
        config = transformers.Gemma3nTextConfig(**_TEXT, **_FIVE, altup_num_inputs=2, laurel_rank=8)
        model = transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="eager")
    else:
        config = transformers.Gemma4TextConfig(**_TEXT, **_FIVE, global_head_dim=64)
        model = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config.do_sample = False
    return model.eval()


@pytest.fixture
def drafting_model(monkeypatch: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    """Gemma 4's model for drafts, all of whose layers read the main model's keys and values."""
    sharing = getattr(transformers.Gemma4TextConfig, "kv_sharing_modes", None)

    def all_shared(self: Any) -> list[str | None]:  # transformers 5.23 refuses what this model is made of
        shared = self.num_kv_shared_layers == self.num_hidden_layers
        return ["reuse"] * self.num_hidden_layers if shared else sharing.fget(self)

    if sharing is not None:  # 5.17 has no such check
        monkeypatch.setattr(transformers.Gemma4TextConfig, "kv_sharing_modes", property(all_shared))
    torch.manual_seed(1)
    text = transformers.Gemma4TextConfig(**_TEXT, **_ONLY_SHARED)
    config = transformers.Gemma4AssistantConfig(text_config=text, backbone_hidden_size=64)
    assistant = transformers.Gemma4AssistantForCausalLM._from_config(config, attn_implementation="eager").eval()
    assistant.generation_config.num_assistant_tokens = 3
    return assistant


@torch.no_grad()
@pytest.mark.parametrize("attention", ["kv4", "eager", "sdpa"])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_models_with_shared_keys_and_values_are_those_on_their_own_cache(name, attention):
    model = sharing_model(name)
    logits = []
    # transformers' own functions give different roundings of the same model: each is held to itself.
    for own in (True, False):
        model.set_attn_implementation("eager" if own and attention == "kv4" else attention)
        cache = DynamicCache(config=model.config) if own else kv4.hf.KV4Cache(model.config, Recipe.exact())
        parts = []
        for ids in hf_cases.tokens_of(2, 120).split([70, 20, 1, 1, 28], 1):
            parts.append(model(ids, past_key_values=cache).logits)
            parts.append(model(ids, past_key_values=cache, logits_to_keep=1).logits)
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4 if attention == "kv4" else 0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["kv4", "eager", "sdpa"])
@pytest.mark.parametrize("length", [12, 90])
def test_a_drafting_model_reads_keys_and_values_of_the_forward_before_a_crop(length, attention, drafting_model):
    """Gemma 4's drafts attend to what the model returned, after generate() has cropped the cache."""
    model, assistant = sharing_model("gemma4"), drafting_model
    ids = hf_cases.tokens_of(1, length)
    results = []
    for own in (True, False):
        for part in (model, assistant):
            part.set_attn_implementation("eager" if own and attention == "kv4" else attention)
        cache = DynamicCache(config=model.config) if own else kv4.hf.KV4Cache(model.config, Recipe.exact())
        results.append(
            hf_cases.generate(model, cache, {"input_ids": ids}, 24, assistant_model=assistant, output_scores=True)
        )
    assert torch.equal(results[0].tokens, results[1].tokens)
    for one, other in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_sealed_models_with_shared_keys_and_values_generate(name, drafting_model):
    """With the default recipe, through attach: assisted decoding gives the text of one-by-one decoding."""
    model = kv4.hf.attach(sharing_model(name))
    options = {"max_new_tokens": 24, "return_dict_in_generate": True}

    def text(**kwargs: Any) -> torch.Tensor:
        return model.generate(hf_cases.tokens_of(1, 150), **options, **kwargs).sequences

    assert torch.equal(text(prompt_lookup_num_tokens=4), text())
    if name == "gemma4":
        # Drafts want all hidden states, and with them the prompt goes through the sharing layers whole.
        assert torch.equal(text(assistant_model=drafting_model), text(output_hidden_states=True))


@torch.no_grad()
def test_a_hook_may_keep_what_update_returned():
    model = hf_cases.model_of("gemma3")
    model.set_attn_implementation("kv4")
    kept: list[tuple[Any, Any]] = []
    try:
        cache = kv4.hf.KV4Cache(model.config, Recipe.exact())
        own = DynamicCache(config=model.config)
        updates = []
        for store, into in ((cache, kept), (own, updates)):
            update = store.update

            def keeping(*args: Any, update=update, into=into, **kwargs: Any) -> Any:
                into.append(update(*args, **kwargs))
                return into[-1]

            store.update = keeping
            for ids in hf_cases.tokens_of(1, 60).split([40, 1, 1, 18], 1):
                model(ids, past_key_values=store)
    finally:
        model.set_attn_implementation("eager")
    for mine, theirs in zip(kept, updates, strict=True):
        for handle, tensor in zip(mine, theirs, strict=True):
            torch.testing.assert_close(handle.dense(), tensor, rtol=0, atol=1e-4)
