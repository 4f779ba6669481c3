"""Pages of other widths than 4 bits in Python: recipes, the packed cache against its simulation, widths of layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny_model
from kv4 import Recipe, Side, _core
from kv4.bench.text import python_reference
from kv4.calibration import identity_of, load
from kv4.evaluate.layers import calibrate
from kv4.evaluate.quality import Candidate, measure_all
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.variant import Variant
from kv4.evaluate.windows import cut
from kv4.hf import KV4Cache, attach, detach

WIDTHS = (2, 3, 4, 6, 8)


def test_recipes_say_their_bits_where_they_are_not_4(tmp_path: Path) -> None:
    assert "bits" not in Recipe().to_dict()["key"]  # what reads such a file need not know of widths
    recipe = Recipe().with_bits(3, 8)
    assert recipe.to_dict()["key"]["bits"] == 3 and recipe.to_dict()["value"]["bits"] == 8
    recipe.to_file(tmp_path / "r.json")
    assert Recipe.from_file(tmp_path / "r.json") == recipe
    assert recipe.with_bits(4, 4) == Recipe()
    with pytest.raises(ValueError, match=r"^recipe.key.bits: expected 2, 3, 4, 6 or 8; got 5"):
        Recipe().with_bits(5, 4)
    with pytest.raises(ValueError, match=r"^recipe.value.levels: expected lloyd_max or trellis with 3 bits; got uni"):
        Recipe(value=Side(bits=3, levels="uniform"))
    data = {**Recipe().to_dict(), "key": {"bits": "3"}}
    with pytest.raises(ValueError, match=r"^recipe.key.bits: expected int; got '3'"):
        Recipe.from_dict(data)


@pytest.mark.parametrize("bits", [(2, 3), (3, 2), (6, 8), (8, 6), (4, 3)])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_the_packed_cache_reads_what_is_simulated(bits: tuple[int, int], d: int) -> None:
    torch.manual_seed(d)
    recipe = Recipe().with_bits(*bits)
    recipe = dataclasses.replace(recipe, key=dataclasses.replace(recipe.key, lambda_="none"))
    k, v = (torch.randn(2, 4 + 3 * 64 + 64, d) for _ in range(2))
    core = _core.Cache(recipe, kv_heads=2, head_dim_k=d, head_dim_v=d)
    core.append(k[None], v[None])
    queries = torch.randn(1, 4, k.shape[1], d)
    core.attend(queries, torch.empty_like(queries))
    core.seal()
    assert core.page_count(0) == 3
    codes = core.page_codes(0, 0, 0)
    assert [len(x) for x in codes] == [8 * bits[0] * d, 8 * bits[1] * d]
    variant = Variant().replace(key__bits=bits[0], value__bits=bits[1], key__lambda_="none")
    sealed = seal_layer(_Session(variant, None, None), 0, queries[0].double(), k.double(), v.double())
    for own, simulated, read in zip((k, v), sealed, (core.dense_keys, core.dense_values), strict=True):
        packed = torch.empty(1, 2, 192, d)
        read(4, 192, packed)
        # A code on the other side of a tie moves a vector by a level; nothing else may differ by more than
        # an fp16 ulp of its scale and mean.
        apart = (simulated[:, :192] - packed[0]).norm(dim=-1) / own[:, 4:196].norm(dim=-1)
        assert (apart < 2e-3).float().mean() > 0.98
        assert apart.max() < 0.4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = tiny_model.load(folder)
    return model, cut(tokenizer, python_reference(), 2, 600), folder


def _filled(model: torch.nn.Module, ids: torch.Tensor, **given: object) -> tuple[KV4Cache, torch.Tensor]:
    attach(model)
    try:
        cache = KV4Cache(model.config, **given)
        with torch.inference_mode():
            for part in ids.split(128, dim=1):
                logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    finally:
        detach(model)
    return cache, logits


def test_each_layer_has_its_widths_and_keeps_them_in_a_file(tiny: tuple, tmp_path: Path) -> None:
    model, windows, _ = tiny
    bits = [(3, 2), (4, 4), (8, 6)]
    cache, logits = _filled(model, windows[0], bits=bits)
    assert [(x.recipe.key.bits, x.recipe.value.bits) for x in cache.packed_layers()] == bits
    assert cache.recipe == Recipe()
    some, _ = _filled(model, windows[0], bits={2: (2, 2)})
    assert [x.recipe.key.bits for x in some.packed_layers()] == [4, 4, 2]
    assert some.nbytes() < cache.nbytes()
    file = tmp_path / "cache"
    cache.save(file)
    for given in ({}, {"bits": bits}):
        again = KV4Cache.load(file, model.config, **given)
        assert [x.recipe for x in again.packed_layers()] == [x.recipe for x in cache.packed_layers()]
        assert again.layers[2].core.page_codes(0, 0, 0) == cache.layers[2].core.page_codes(0, 0, 0)
    with pytest.raises(ValueError, match=r"layers\[0\].bits: expected \[6, 2\]; got \[3, 2\]"):
        KV4Cache.load(file, model.config, bits=[(6, 2), (4, 4), (8, 6)])
    assert logits.isfinite().all()


@pytest.mark.parametrize(("bits", "message"), [
    ([(4, 4)], r"bits: expected one entry per layer \(3\); got 1"),
    ({3: (4, 4)}, r"bits: expected layer indices 0...2; got 3"),
    ([(4, 4), 4, (4, 4)], r"bits\[1\]: expected bits of keys and bits of values; got 4"),
    ([(4, 4), (4, 4), (4, 5)], r"bits\[2\]: recipe.value.bits: expected 2, 3, 4, 6 or 8; got 5"),
    (4.25, r"bits: expected a pair for each layer; got float"),
])  # fmt: skip
def test_widths_that_do_not_fit_are_refused(tiny: tuple, bits: object, message: str) -> None:
    model, _, _ = tiny
    with pytest.raises(ValueError, match=f"^{message}"):
        KV4Cache(model.config, bits=bits)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^{message}"):
        attach(model, bits=bits)
    assert model.config._attn_implementation == before


def test_a_calibration_gives_the_packed_cache_its_widths(tiny: tuple, tmp_path: Path) -> None:
    model, windows, folder = tiny
    budgets = (2.5, 3.25, 4.25)
    made = calibrate(model, windows[:1], bits=budgets, identity=identity_of(folder), text="a text")
    file = tmp_path / "layers.safetensors"
    made.save(file)
    back = load(file, folder)
    assert back.refined == 0 and {x for b in budgets for pair in back.widths_of(b) for x in pair} <= set(WIDTHS)
    candidates = [Candidate(f"packed {b:g}", back.recipe, back, b) for b in budgets]
    candidates += [Candidate(f"simulated {b:g}", Variant(widths=back.widths_of(b)), back) for b in budgets]
    found = measure_all(model, windows[1:], candidates)
    for b in budgets:
        packed, simulated = found[f"packed {b:g}"], found[f"simulated {b:g}"]
        assert packed.cache_bytes > 0 and simulated.cache_bytes == 0
        assert packed.kl == pytest.approx(simulated.kl, rel=0.05)  # queries and weights rounded to 16 bits, ties
    assert found["packed 2.5"].kl > found["packed 3.25"].kl > found["packed 4.25"].kl > 0
    assert found["packed 2.5"].cache_bytes < found["packed 3.25"].cache_bytes < found["packed 4.25"].cache_bytes
    given = back.arguments(3.25)
    assert given == {"recipe": Recipe(), "bits": back.widths_of(3.25)}
    attach(model, **given)
    try:
        ids = windows[0][:, :300]
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        assert tuple((x.recipe.key.bits, x.recipe.value.bits) for x in cache.packed_layers()) == given["bits"]
    finally:
        detach(model)
    with pytest.raises(ValueError, match=r"^bits: expected a budget of the calibration, 2.5, 3.25, 4.25; got None"):
        back.arguments()
    with pytest.raises(ValueError, match=r"^bits: expected a budget of the calibration, 2.5, 3.25, 4.25; got 3"):
        back.arguments(3)
    back.tensors["layer.1.widths"][1, 0] = 5
    assert back.arguments(2.5)["bits"]
    with pytest.raises(ValueError, match="^calibration: expected what the packed cache has; got widths of 5 bits"):
        back.arguments(3.25)
    back.refined = 3
    with pytest.raises(ValueError, match="^calibration: expected what the packed cache has; got 3 refined tokens"):
        back.arguments(2.5)


def test_what_has_no_kernels_for_widths_refuses_them() -> None:
    recipe = Recipe().with_bits(4, 3)
    with pytest.raises(NotImplementedError, match=r"^recipe.value.bits: expected 4 on Metal; got 3"):
        _core.MetalTables(recipe, dtype="float32", kv_heads=1, head_dim_k=64, head_dim_v=64)


def test_files_with_other_widths_than_kv4_s_are_refused(tmp_path: Path) -> None:
    recipe = Recipe().to_dict()
    recipe["key"]["bits"] = 7
    meta = {"format": "kv4-calibration", "version": "1", "recipe": json.dumps(recipe), "model": "{}"}
    file = tmp_path / "c.safetensors"
    save_file({"layer.0.key.lambda": torch.ones(1, 4)}, str(file), meta)
    with pytest.raises(ValueError, match=r"recipe.key.bits: expected 2, 3, 4, 6 or 8; got 7"):
        load(file)
