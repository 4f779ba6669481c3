"""torch.compile around a model that runs on kv4: one graph for a decode step, and the answers of eager mode."""

import copy
import gc
import weakref

import pytest
import torch
import torch._dynamo

import hf_cases
import kv4.hf
from kv4 import Recipe
from kv4.hf import attention, ops

one_thread = hf_cases.one_thread


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def attached(name):
    return kv4.hf.attach(hf_cases.model_of(name))


@torch.no_grad()
def decoded(model, step, cache, ids, steps, **kwargs):
    """Logits of a prefill in eager mode and of `steps` tokens through `step`."""
    logits = [model(ids, past_key_values=cache, **kwargs).logits[:, -1]]
    for _ in range(steps):
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (0, 1), value=1)
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(step(input_ids=token, past_key_values=cache, **kwargs).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_decode_step_is_one_graph(name, backend):
    """Across a sealing; the second step makes the lengths dynamic, and nothing is compiled after it."""
    model = attached(name)
    try:
        ids = hf_cases.tokens_of(2, 125)
        eager, compiled = kv4.hf.new_cache(model), kv4.hf.new_cache(model)
        expected = decoded(model, model, eager, ids, 10)
        step = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(decoded(model, step, compiled, ids, 10), expected, rtol=0, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        # A longer cache, another cache: the graph still serves.
        decoded(model, step, kv4.hf.new_cache(model), hf_cases.tokens_of(2, 200), 3)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
        assert compiled.get_seq_length() == 135
        assert [row["sealed"] for row in compiled.describe()] == [row["sealed"] for row in eager.describe()]
    finally:
        kv4.hf.detach(model)


def test_padding_leaves_the_graph_once_and_the_answers_alone():
    model = attached("llama")
    try:
        inputs = hf_cases.left_padded(2, 120)
        ids = inputs.pop("input_ids")
        expected = decoded(model, model, kv4.hf.new_cache(model), ids, 4, **inputs)
        step = torch.compile(model, backend="eager")
        found = decoded(model, step, kv4.hf.new_cache(model), ids, 4, **inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    finally:
        kv4.hf.detach(model)


def test_a_compiled_prefill_begins_in_eager_mode():
    model = attached("llama")
    try:
        ids = hf_cases.tokens_of(1, 150)
        with torch.no_grad():
            expected = model(ids, past_key_values=kv4.hf.new_cache(model)).logits
            step = torch.compile(model, backend="eager")
            cache = kv4.hf.new_cache(model)
            torch.testing.assert_close(step(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
            # Another long call, into a cache that now exists: its own tokens are seen exactly and let go of.
            again = kv4.hf.new_cache(model)
            model(ids, past_key_values=again)
            expected = model(ids, past_key_values=again).logits
            torch.testing.assert_close(step(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
            assert all(handle.own is None for layer in cache.packed_layers() for handle in layer.appended)
    finally:
        kv4.hf.detach(model)


def filled():
    layer = kv4.hf.KV4Layer(Recipe())
    layer.update(torch.randn(1, 2, 70, 64), torch.randn(1, 2, 70, 64))
    return layer


def test_the_operators_keep_the_contract_of_torch():
    layer = filled()
    k, v, q = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 4, 1, 64)
    tests = ("test_schema", "test_faketensor")  # the others call an operator twice, and appending twice is not once
    torch.library.opcheck(ops.append, (layer.state, k, v, layer.number), test_utils=tests)
    args = (layer.state, q, layer.number, 64, None, None, None, None, True)
    ops.append(layer.state, k, v, layer.number)
    torch.library.opcheck(attention.attend, args, test_utils=tests)
    expected, _ = kv4.hf.kv4_attention(torch.nn.Module(), q, *layer.update(k[:, :, :0], v[:, :, :0]), None)
    ops.append(layer.state, k[:, :, :0], v[:, :, :0], layer.number)
    assert torch.equal(attention.attend(*args), expected)


def test_a_number_speaks_for_one_living_layer():
    layer, q = filled(), torch.randn(1, 4, 1, 64)
    twin = copy.deepcopy(layer)
    assert twin.number != layer.number
    ops.append(twin.state, torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), twin.number)
    assert (twin.seen, layer.seen) == (71, 70)
    twin.crop(-1)
    rest = (64, None, None, None, None, True)
    with pytest.raises(
        RuntimeError, match="layer: expected kv4::append before kv4::attend; got a layer that has changed"
    ):
        attention.attend(twin.state, q, twin.number, *rest)
    number, gone = twin.number, weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match=f"layer: expected the number of a live KV4Layer; got {number}"):
        attention.attend(layer.state, q, number, *rest)


def test_a_compiled_model_without_the_kv4_attention_gets_dense_tensors():
    def step(layer, k, v):
        key, _ = layer.update(k, v)
        return key.sum() + 1

    layer, twin = filled(), filled()
    twin.__dict__.update(copy.deepcopy(layer).__dict__)
    k = torch.randn(1, 2, 1, 64)
    expected = step(twin, k, k)
    torch.testing.assert_close(torch.compile(step, backend="eager")(layer, k, k), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_handle_that_leaves_its_graph_speaks_for_its_update_or_says_that_it_is_stale(backend):
    def step(layer, k, v):
        key, value = layer.update(k, v)
        return key, value, k + 1

    layer, compiled, k = filled(), torch.compile(step, backend=backend), torch.randn(1, 2, 1, 64)
    for change in (lambda: layer.crop(-1), lambda: compiled(layer, k, k), lambda: layer.update(k, k)):
        key, value, _ = compiled(layer, k, 2 * k)
        assert torch.equal(key[:, :, -1:], k) and torch.equal(value[:, :, -1:], 2 * k)
        kept, _, _ = compiled(layer, k, k)
        change()
        with pytest.raises(RuntimeError, match="key: expected a layer that has not changed since the compiled update"):
            kept.dense()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one_take_the_masks_of_eager_mode(backend):
    """Masks are made outside of the graphs that read them: causal, windows, left padding, several tokens."""
    model, inputs = hf_cases.model_of("gemma3"), hf_cases.left_padded(2, 60)
    forwards = [layer.forward for layer in model.model.layers]
    model.set_attn_implementation("kv4")

    def answers():
        cache, logits = kv4.hf.KV4Cache(model.config, Recipe.exact()), []
        for begin, end in ((0, 40), (40, 58), (58, 59), (59, 60)):
            ids, mask = inputs["input_ids"][:, begin:end], inputs["attention_mask"][:, :end]
            logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    try:
        with torch.no_grad():
            expected = answers()
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward, backend=backend)
            torch.testing.assert_close(answers(), expected, rtol=0, atol=1e-4)
    finally:
        for layer, forward in zip(model.model.layers, forwards, strict=True):
            layer.forward = forward
        model.set_attn_implementation("eager")
