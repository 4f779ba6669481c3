"""What a KV4Cache holds: tables that layers share, stored prompts once sealed, cross-attention that is only read."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import hf_cases
import kv4.hf
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe, Side, _core
from kv4.hf.cache import CACHE_ARGUMENT, KV4Layer
from kv4.hf.handle import KVHandle

HEADS, DIM = 2, 32


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((1, HEADS, tokens, DIM), generator=torch.Generator().manual_seed(seed))


def filled(recipe: Recipe | None = None, layers: int = 18, tokens: int = 1, **given) -> kv4.hf.KV4Cache:
    config = hf_cases.model_of("llama").config
    config = type(config)(**(config.to_dict() | {"num_hidden_layers": layers}))
    cache = kv4.hf.KV4Cache(config, recipe, **given)
    for index in range(layers):
        cache.update(rows(tokens, index), rows(tokens, index + 100), index)
    return cache


def identities(cache: kv4.hf.KV4Cache) -> set[int]:
    return {identity for layer in cache.packed_layers() for identity, _, _ in layer.core.shared()}


def test_a_cache_counts_what_its_layers_share_once():
    cache = filled()
    shared = cache.layers[0].core.shared()
    assert len(shared) == 1 and identities(cache) == {shared[0][0]}
    size = shared[0][1]
    assert size > DIM * (4 + 8), "signs alone, in float32 and float64"
    described = cache.describe()
    assert all(row["shared"] == size for row in described)
    assert cache.nbytes() == sum(row["nbytes"] - row["shared"] for row in described) + size


def test_caches_of_one_recipe_share_and_other_seeds_do_not():
    first = filled()
    assert identities(filled()) == identities(copy.deepcopy(first)) == identities(first)
    other = filled(Recipe(key=Side(seed=5, mean=True, lambda_="auto"), value=Side(seed=6)))
    assert len(identities(other)) == 2 and not identities(other) & identities(first)
    assert not identities(filled(Recipe.exact()))


def test_layers_that_are_given_one_matrix_hold_one():
    matrix = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))[0].double()
    recipe = Recipe(key=Side(rotation="dense", mean=True, lambda_="auto"))
    cache = filled(recipe, matrix_k=matrix)
    assert len({layer.constants["matrix_k"].data_ptr() for layer in cache.packed_layers()}) == 1
    assert len(identities(cache)) == 2
    by_layer = filled(recipe, matrix_k=[matrix.clone() for _ in range(18)])
    assert identities(by_layer) == identities(cache), "by what the matrix is, not by which tensor"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_sealed_prompt_takes_what_it_takes_in_use_and_goes_on_as_unsealed(name):
    model = hf_cases.model_of(name, 150)
    kv4.hf.attach(model)
    try:
        ids = hf_cases.tokens_of(1, 1500)
        sealed, other = kv4.hf.new_cache(model), kv4.hf.new_cache(model)
        with torch.no_grad():
            for cache in (sealed, other):
                model(ids, past_key_values=cache)
            sealed.seal()
            assert sealed.nbytes() < other.nbytes() / 3
            packed, twin = sealed.nbytes(), copy.deepcopy(sealed)
            for step in range(3):
                token = ids[:, step : step + 1]
                expected = model(token, past_key_values=other).logits
                assert abs(other.nbytes() - packed) < packed / 20, "what the first token would have left"
                for cache in (sealed, twin):
                    assert torch.equal(model(token, past_key_values=cache).logits, expected)
    finally:
        kv4.hf.detach(model)


def test_sealing_leaves_handles_what_they_had_and_makes_a_crop_inexact():
    layer = KV4Layer(Recipe())
    layer.seal()  # nothing to do, and nothing made
    assert layer.core is None
    k, _ = layer.update(rows(300), rows(300, 1))
    exact = layer.dense("key", 0, 300)
    layer.seal()
    assert torch.equal(k.dense(), exact)
    assert layer.core.exact_tokens(0) < 4 + 128
    layer.crop(-150)
    assert not torch.equal(layer.dense("key", 0, 150), exact[:, :, :150])
    assert torch.equal(layer.dense("key", 0, 4), exact[:, :, :4]), "sinks stay exact"


# Cross-attention: updated once, read ever after.

STATES = 500  # of the encoder


@functools.cache
def mllama() -> transformers.PreTrainedModel:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    torch.manual_seed(0)
    config = MllamaTextConfig(
        vocab_size=hf_cases.VOCAB, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.MllamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(1.0)  # closed in a new model
    return model


def mllama_logits(
    cache, tokens: int, states: int = STATES, steps: int = 4, each=lambda cache: None
) -> list[torch.Tensor]:
    """Of a prompt with an encoder's states, then of single tokens without."""
    model, random = mllama(), torch.Generator().manual_seed(3)
    x = torch.randn((1, states, 128), generator=random)
    ids = torch.randint(3, hf_cases.VOCAB, (1, tokens + steps), generator=random)
    hidden = torch.zeros(1, 1, 1, states)
    hidden[..., states // 2 :] = torch.finfo(torch.float32).min  # as padded tiles are
    logits = []
    with torch.no_grad():
        for first, end in [(0, tokens), *((t, t + 1) for t in range(tokens, tokens + steps))]:
            n = end - first
            out = model(
                ids[:, first:end],
                cross_attention_states=x if not first else None,
                cross_attention_mask=hidden.expand(1, 1, n, states),
                full_text_row_masked_out_mask=torch.ones(1, 1, n, 1),
                **{CACHE_ARGUMENT: cache},
            )
            logits.append(out.logits[:, -1])
            each(cache)
    return logits


@pytest.mark.parametrize("tokens", [20, 100])
@pytest.mark.parametrize("states", [7, 500])
def test_mllama_with_exact_rows_gives_the_logits_of_its_own_cache(tokens, states, monkeypatch):
    monkeypatch.setattr(kv4.hf.handle, "_warned", False)
    expected = mllama_logits(DynamicCache(config=mllama().config), tokens, states)
    kv4.hf.attach(mllama(), Recipe.exact())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a handle that was made dense
            got = mllama_logits(kv4.hf.new_cache(mllama()), tokens, states)
    finally:
        kv4.hf.detach(mllama())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def with_states_of(layers: list[KV4Layer], own: Callable[[], list]) -> Callable[..., None]:
    """A hook that puts what kv4's layers hold, dequantised, into a cache of the model's own once it has its states."""
    done = []

    def hook(*_) -> None:
        if not done:
            for layer, to in zip(layers, own(), strict=True):
                to.keys, to.values = (layer.dense(which, 0, layer.seen) for which in ("key", "value"))
        done.append(True)

    return hook


@pytest.mark.parametrize("attached", [True, False])
def test_mllama_s_cross_attention_is_sealed_by_the_first_step_that_reads_it(attached):
    held = []

    def note(cache) -> None:
        held.append((cache.layers[1].nbytes(), cache.layers[1].core.exact_tokens(0)))

    if attached:
        kv4.hf.attach(mllama())
    try:
        cache = kv4.hf.KV4Cache(mllama().config)
        logits = mllama_logits(cache, 100, each=note)
    finally:
        kv4.hf.detach(mllama())
    (loose, exact), *after = held
    assert exact == STATES
    assert all(nbytes < loose / 2 and rows < 4 + 128 for nbytes, rows in after)
    layer = cache.layers[1]
    assert layer.core.sealed_tokens(0) == (STATES - 4 - 64) // 64 * 64 and layer.core.lambda_(0)

    # The call that brought the states saw them exactly; those after it see what the pages say.
    own = DynamicCache(config=mllama().config)
    expected = mllama_logits(own, 100, each=with_states_of([layer], lambda: [own.layers[1]]))
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=2e-5)
    for a, b in zip(logits[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * b.abs().max().item())  # the bound of packed attention
    unsealed = mllama_logits(DynamicCache(config=mllama().config), 100)
    assert not torch.allclose(logits[1], unsealed[1], rtol=0, atol=1e-5), "pages were read"


def test_a_crop_leaves_cross_attention_and_a_copy_reads_it():
    kv4.hf.attach(mllama())
    try:
        cache = kv4.hf.new_cache(mllama())
        mllama_logits(cache, 20)
        twin = copy.deepcopy(cache)
        cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == [22, STATES, 22]
        mine, other = cache.layers[1], twin.layers[1]
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            assert type(a) is type(b) is KVHandle
            assert torch.equal(a.dense(), b.dense())
    finally:
        kv4.hf.detach(mllama())


@functools.cache
def seq2seq(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    small = {
        "vocab_size": hf_cases.VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    if name == "t5":
        config = transformers.T5Config(
            **small, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        config = transformers.BartConfig(
            **small, **heads, **layers, d_model=64, max_position_embeddings=1024, dropout=0.0
        )
        model = transformers.BartForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model.eval()


def seq2seq_logits(model, cache, each=lambda: None) -> list[torch.Tensor]:
    ids, steps = hf_cases.tokens_of(1, 300), hf_cases.tokens_of(1, 6)
    logits = []
    with torch.no_grad():
        encoded = model.get_encoder()(ids)
        for t in range(6):
            out = model(encoder_outputs=encoded, decoder_input_ids=steps[:, t : t + 1], past_key_values=cache)
            logits.append(out.logits[:, -1])
            each()
    return logits


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_reads_kv4_caches_and_seals_its_cross_attention(name):
    model = seq2seq(name)
    own = seq2seq_logits(
        model, EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    )

    def caches(recipe):
        return [kv4.hf.KV4Cache(model.config, recipe, cross_attention=cross) for cross in (False, True)]

    exact = seq2seq_logits(model, EncoderDecoderCache(*caches(Recipe.exact())))
    for a, b in zip(exact, own, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    cache, held = EncoderDecoderCache(*caches(Recipe())), []
    logits = seq2seq_logits(model, cache, lambda: held.append(cache.cross_attention_cache.nbytes()))
    assert max(held[1:]) < held[0] / 1.5
    layers = cache.cross_attention_cache.layers
    assert all(layer.core.sealed_tokens(0) >= 192 for layer in layers)
    stock = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    expected = seq2seq_logits(model, stock, with_states_of(layers, lambda: stock.cross_attention_cache.layers))
    for a, b in zip(logits, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="encoder-decoder"):
        kv4.hf.attach(model)


def test_a_layer_that_is_updated_like_any_other_is_not_sealed_by_reading_it():
    layer = KV4Layer(Recipe())
    layer.update(rows(300), rows(300, 1))
    assert isinstance(layer.keys, torch.Tensor) and layer.core.exact_tokens(0) == 300
    assert _core.Cache(Recipe(), kv_heads=1, head_dim_k=64, head_dim_v=64).shared()
