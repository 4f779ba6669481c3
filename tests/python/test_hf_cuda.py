"""The HuggingFace layer on a CUDA device: the same tokens and logits as on the CPU and as the model's own cache."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import hf_cases
import kv4.hf
from kv4 import Recipe, _core

pytestmark = pytest.mark.skipif(
    "cuda" not in _core.backends() or not torch.cuda.is_available(),
    reason=f"no CUDA device for kv4: {_core.why_not('cuda') or 'torch finds none'}",
)

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
# 16 units in the last place of logits of up to 16.
TOLERANCE = {torch.float16: 0.125, torch.bfloat16: 1.0}


def model_of(name, dtype=torch.float16, dim=64):
    """A model of hf_cases with a head dim that the kernels serve, in `dtype`, on the CPU. All its experts take part in
    every token: a choice among them would turn on the last bit of a score."""
    changes = {"head_dim": dim, "hidden_size": 4 * dim}
    if name == "gpt_oss":
        changes["num_experts_per_tok"] = 4
    return copy.deepcopy(hf_cases.model_of(name, sliding_window=100, **changes)).to(dtype)


def attached(name, dtype=torch.float16, recipe=None, dim=64):
    return kv4.hf.attach(model_of(name, dtype, dim).to(DEVICE), recipe)


@torch.inference_mode()
def forced(model, cache, ids, calls):
    """Logits of every token of ids, fed in calls of the given lengths, in float32 on the CPU."""
    found, begin = [], 0
    for length in calls:
        part = ids[:, begin : begin + length].to(model.device)
        found.append(model(input_ids=part, past_key_values=cache).logits.float().cpu())
        begin += length
    return torch.cat(found, 1)


CALLS = {"one by one": (1,) * 150, "prefill": (140, *(1,) * 60), "chunks": (100, 33, 130, 5, *(1,) * 10)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"])
def test_exact_rows_give_the_own_caches_logits(name, calls, dtype):
    model = model_of(name, dtype).to(DEVICE)
    ids = hf_cases.tokens_of(2, sum(calls))
    expected = forced(model, DynamicCache(config=model.config), ids, calls)
    kv4.hf.attach(model, Recipe.exact())
    found = forced(model, kv4.hf.new_cache(model), ids, calls)
    # The own attention rounds its scores and weights to the dtype, which a few logits show.
    assert ((found - expected).abs() > TOLERANCE[dtype]).float().mean() < 1 / 500


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", None),
        ("gemma3", None),
        ("gpt_oss", None),
        ("llama", Recipe(bits=3.25)),
        ("gemma3", Recipe().with_bits(2, 3)),
    ],
    ids=lambda x: x if isinstance(x, str) else "" if x is None else f"{x.bits or 'K2V3'}",
)
def test_packed_pages_give_the_cpus_logits(name, recipe, calls):
    """Codes differ where a value lies on a decision boundary, so it is the mean that must agree closely."""
    model = attached(name, recipe=recipe)
    ids = hf_cases.tokens_of(2, sum(calls))
    on_device = kv4.hf.new_cache(model)
    found = forced(model, on_device, ids, calls)
    model = model.to("cpu")
    on_cpu = kv4.hf.new_cache(model)
    expected = forced(model, on_cpu, ids, calls)
    assert [row.get("sealed") for row in on_device.describe()] == [row.get("sealed") for row in on_cpu.describe()]
    assert sum(sum(row["sealed"]) for row in on_device.describe()) > 0
    error = (found - expected).abs()
    assert error.mean() < 0.02 * expected.std()


def test_left_padding_and_masks_with_holes():
    model = model_of("qwen3").to(DEVICE)
    for hole in (False, True):
        inputs = hf_cases.left_padded(3, 130)
        mask = F.pad(inputs["attention_mask"], (0, 20), value=1)
        if hole:
            mask[1, 100:110] = 0
        ids = torch.cat([inputs["input_ids"], hf_cases.tokens_of(3, 20, seed=4)], 1)
        calls = (130, *(1,) * 20)
        positions = mask.cumsum(-1) - 1
        kv4.hf.detach(model)
        own, packed = [], []
        for found, recipe in ((own, None), (packed, Recipe.exact())):
            if recipe is not None:
                kv4.hf.attach(model, recipe)
            cache = DynamicCache(config=model.config) if recipe is None else kv4.hf.new_cache(model)
            begin = 0
            for length in calls:
                with torch.inference_mode():
                    out = model(
                        ids[:, begin : begin + length].to(DEVICE),
                        attention_mask=mask[:, : begin + length].to(DEVICE),
                        position_ids=positions[:, begin : begin + length].clamp(min=0).to(DEVICE),
                        past_key_values=cache,
                    )
                found.append(out.logits.float().cpu())
                begin += length
        real = mask.bool()
        torch.testing.assert_close(
            torch.cat(packed, 1)[real], torch.cat(own, 1)[real], rtol=0, atol=TOLERANCE[torch.float16]
        )


def generated(model, ids, **kwargs):
    out = model.generate(ids.to(DEVICE), max_new_tokens=40, do_sample=False, return_dict_in_generate=True, **kwargs)
    return out.sequences.cpu(), out.past_key_values


def test_generate_greedy_beams_and_lookup():
    model = attached("llama")
    ids = hf_cases.tokens_of(2, 150)
    tokens, cache = generated(model, ids)
    assert cache.packed_layers()[0].device.type == "cuda" and cache.nbytes() > 0
    assert generated(model, ids)[0].equal(tokens)
    beams, _ = generated(model, ids, num_beams=3)
    assert beams.shape == tokens.shape
    one = hf_cases.repetitive(150)
    plain, looked_up = generated(model, one)[0], generated(model, one, prompt_lookup_num_tokens=5)[0]
    assert (plain == looked_up).float().mean() > 0.9  # a near tie may fall otherwise in a call of several tokens


def test_crop_deepcopy_select_repeat_and_dense_views():
    model = attached("llama")
    ids = hf_cases.tokens_of(2, 200)
    cache = kv4.hf.new_cache(model)
    with torch.inference_mode():
        model(ids.to(DEVICE), past_key_values=cache)
        twin = copy.deepcopy(cache)
        step = hf_cases.tokens_of(2, 1, seed=5).to(DEVICE)
        first = model(step, past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(model(step, past_key_values=cache).logits, first, rtol=0, atol=1e-3)
        torch.testing.assert_close(model(step, past_key_values=twin).logits, first, rtol=0, atol=1e-3)
        twin.crop(-60)
        assert twin.get_seq_length() == 141
        twin.reorder_cache(torch.tensor([1, 1], device=DEVICE))
        out = model(step[:1].expand(2, 1), past_key_values=twin).logits
        torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([3, 0], device=DEVICE))
        layer = twin.packed_layers()[0]
        assert layer.keys.is_cuda and layer.keys.shape == (2, layer.kv_heads, 142, 64)
        assert layer.keys.isfinite().all()


def test_what_does_not_fit_is_refused_by_name():
    model = model_of("llama", torch.float32).to(DEVICE)
    with pytest.raises(ValueError, match="float32"):
        kv4.hf.attach(model)
    with pytest.raises(ValueError, match="head dim"):
        kv4.hf.attach(model_of("llama", dim=48).to(DEVICE))
    with pytest.raises(ValueError, match=r"recipe.key.bits: expected 2, 3 or 4 on CUDA; got 6"):
        kv4.hf.attach(model_of("llama", torch.float16).to(DEVICE), Recipe().with_bits(6, 4))
    layer = kv4.hf.KV4Layer(Recipe())
    k = torch.randn(1, 2, 3, 64, device=DEVICE, dtype=torch.float16)
    with pytest.raises(ValueError, match="value_states: expected a tensor on cuda:0; got cpu"):
        layer.update(k, k.cpu())
    layer.update(k, k)
    with pytest.raises(ValueError, match="key_states: expected a tensor on cuda:0; got cpu"):
        layer.update(k.cpu(), k.cpu())
    key, value = layer.update(k, k)
    with pytest.raises(ValueError, match="q"):
        kv4.hf.kv4_attention(torch.nn.Module(), k.cpu(), key, value, None)


def test_another_stream():
    model = attached("llama")
    ids = hf_cases.tokens_of(1, 200).to(DEVICE)
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), torch.inference_mode():
            cache = kv4.hf.new_cache(model)
            model(ids, past_key_values=cache)
            out = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70)]
        torch.cuda.synchronize()
        results.append(torch.cat(out, 1))
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_decode_step(mode):
    model = attached("llama")
    ids = hf_cases.tokens_of(2, 125)
    torch._dynamo.reset()
    step = torch.compile(model, mode=mode, fullgraph=True)
    results = []
    for run in (model, step):
        cache = kv4.hf.new_cache(model)
        with torch.inference_mode():
            model(ids.to(DEVICE), past_key_values=cache)
            out = [run(input_ids=ids[:, i : i + 1].to(DEVICE), past_key_values=cache).logits.clone() for i in range(20)]
        results.append(torch.cat(out, 1).float())
    torch.testing.assert_close(*results, rtol=0, atol=TOLERANCE[torch.float16])


def test_steps_of_a_captured_graph_are_those_of_eager_mode():
    """Through sealings, a crop and the end of the room that was reserved."""
    for name in ("llama", "gemma3"):
        model = attached(name)
        ids = hf_cases.tokens_of(2, 150)
        text = hf_cases.tokens_of(2, 160, seed=7).to(DEVICE)
        eager, replayed = (kv4.hf.new_cache(model) for _ in range(2))
        with torch.inference_mode():
            for cache in (eager, replayed):
                model(ids.to(DEVICE), past_key_values=cache)
            step = kv4.hf.DecodeGraph(model, replayed, reserve=100)
            for i in range(150):
                if i == 40:
                    for cache in (eager, replayed):
                        cache.crop(-1)
                expected = model(text[:, i : i + 1], past_key_values=eager).logits
                torch.testing.assert_close(
                    step(text[:, i : i + 1]), expected, rtol=0, atol=1e-2, msg=lambda m, i=i: f"step {i}: {m}"
                )
        assert step.captured >= 2
        assert [r["sealed"] for r in replayed.describe()] == [r["sealed"] for r in eager.describe()]
        assert replayed.get_seq_length() == eager.get_seq_length() == 299


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_captured_graph_serves_left_padding(name):
    model = attached(name)
    inputs = hf_cases.left_padded(3, 150)
    text = hf_cases.tokens_of(3, 160, seed=7).to(DEVICE)
    mask = F.pad(inputs["attention_mask"], (0, 160), value=1).to(DEVICE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    eager, replayed = (kv4.hf.new_cache(model) for _ in range(2))

    def call(ids, begin, cache):
        end = begin + ids.shape[1]
        return model(
            ids, attention_mask=mask[:, :end], position_ids=positions[:, begin:end], past_key_values=cache
        ).logits

    with torch.inference_mode():
        for cache in (eager, replayed):
            call(inputs["input_ids"].to(DEVICE), 0, cache)
        step = kv4.hf.DecodeGraph(model, replayed, reserve=50, attention_mask=mask[:, :150])
        for i in range(160):
            if i == 120:  # every row has sealed its first page by now
                for cache in (eager, replayed):
                    cache.crop(-1)
            begin = eager.get_seq_length()
            expected = call(text[:, i : i + 1], begin, eager)
            torch.testing.assert_close(
                step(text[:, i : i + 1]), expected, rtol=0, atol=1e-2, msg=lambda m, i=i: f"step {i}: {m}"
            )
    assert step.captured >= 2


def test_a_graph_says_what_it_cannot_serve():
    model = attached("llama")
    cache = kv4.hf.new_cache(model)
    with pytest.raises(ValueError, match="cache: expected a prefilled cache; got an empty one"):
        kv4.hf.DecodeGraph(model, cache)
    padded = filled(model)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 1\]; got \[1, 2\]"):
        kv4.hf.DecodeGraph(model, padded, attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="cache: expected a KV4Cache"):
        kv4.hf.DecodeGraph(model, DynamicCache(config=model.config))
    kv4.hf.detach(model)
    with pytest.raises(ValueError, match="model: expected one under the kv4 attention"):
        kv4.hf.DecodeGraph(model, filled(model))


def filled(model):
    cache = kv4.hf.KV4Cache(model.config)
    k = torch.zeros(1, 1, 1, 64, device=DEVICE, dtype=torch.float16)
    for index in range(len(cache.layers)):
        cache.update(k, k, index)
    return cache
