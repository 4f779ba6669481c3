"""Bits a value: what pages take, what a recipe's budget becomes, in a cache, a model and a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_model
from kv4 import Recipe, Side, _core
from kv4.evaluate.layers import layer_widths
from kv4.evaluate.variant import Variant, from_recipe, q4_0, q8_0
from kv4.hf import KV4Cache, attach, detach

PAGE, HEADS = 64, 2


def _held(recipe: Recipe, d: int, pages: int) -> tuple[int, int]:
    """Bytes of a cache with so many pages: in memory and in a file."""
    core = _core.Cache(recipe, kv_heads=HEADS, head_dim_k=d, head_dim_v=d)
    rows = torch.zeros(1, HEADS, recipe.sinks + PAGE * pages + recipe.window, d)
    core.append(rows, rows)
    core.seal()
    assert core.page_count(0) == pages
    written: list[int] = []
    core.save(lambda part: written.append(len(bytes(part))))
    return core.nbytes(), sum(written)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize(("bits", "refined"), [((4, 4), 0), ((4, 4), 1), ((4, 4), 2), ((3, 2), 0), ((6, 8), 1)])
def test_bits_a_value_are_those_of_the_packed_cache(d: int, bits: tuple[int, int], refined: int) -> None:
    recipe = dataclasses.replace(Recipe().with_bits(*bits), refined=refined)
    few, many = _held(recipe, d, 8), _held(recipe, d, 72)
    memory, file = ((b - a) / 64 for a, b in zip(few, many, strict=True))
    page = recipe.bits_per_value(d) * PAGE * 2 * d * HEADS / 8
    assert 0 <= memory - page < 64  # and the notes of a page, and slabs' own: less than a line
    assert file - page == 16 + 8  # and its block's head and checksum, and its number
    assert from_recipe(recipe).bits_per_value(d, d) == recipe.bits_per_value(d)


def test_bits_of_other_formats_are_those_of_their_parts() -> None:
    assert (q8_0().bits_per_value(128, 128), q4_0().bits_per_value(128, 128)) == (8.5, 4.5)
    assert Recipe.paper().bits_per_value(128) == 4.125 and Recipe.exact().bits_per_value(100) == 16
    assert Recipe().bits_per_value(128, 64) == (4.375 * 128 + 4.25 * 64) / 192
    groups = dataclasses.replace(Recipe(), value=Side(group=32))
    assert groups.bits_per_value(128) == 4.25 + 3 * 16 / 128 / 2
    # 5 bits are no width of a page, but their second rows would fill lines of 64 bytes as others do.
    five = Variant(refined=1).replace(both__bits=5)
    assert five.bits_per_value(128, 128) == Recipe(refined=1).bits_per_value(128) + 1
    with pytest.raises(NotImplementedError, match="^head_dim_k: expected an even number from 32 to 512"):
        Recipe().bits_per_value(30)


@pytest.mark.parametrize("d", [72, 128, 256])
@pytest.mark.parametrize("refined", [0, 1, 2])
def test_a_calibrations_budget_is_what_its_caches_take(d: int, refined: int) -> None:
    random = torch.Generator().manual_seed(4)
    widths = (2, 3, 4, 6, 8)
    table = torch.rand(2, 5, len(widths), dtype=torch.float64, generator=random).sort(-1, descending=True).values
    for budget in (2.8, 3.25, 4.3):
        chosen = layer_widths(table, budget, Variant(refined=refined), (d, d), widths)
        layers = [dataclasses.replace(Recipe().with_bits(*pair), refined=refined) for pair in chosen]
        taken = sum(layer.bits_per_value(d) for layer in layers) / len(layers)
        assert budget - 0.3 < taken <= budget


def test_a_budget_becomes_widths() -> None:
    assert [Recipe(bits=b).at(128) for b in (4.25, 3.25, 2.25)] == [
        Recipe(), Recipe().with_bits(4, 2), Recipe().with_bits(2, 2)
    ]  # fmt: skip
    refined = Recipe(bits=4.3125, refined=1)
    assert refined.at(128) == Recipe(refined=1) and Recipe(bits=4.3, refined=1).at(128).value.bits == 3
    assert Recipe(bits=9).at(128).key.bits == 8 and Recipe().at(128) == Recipe()
    for d, layers in ((64, 7), (128, 10), (256, 18)):
        last: tuple[float, ...] = ()
        for budget in (2.4, 2.5, 2.8, 3.25, 3.5, 4.25, 4.4, 6, 8.1):
            recipe = Recipe(bits=budget)
            own = [recipe.at(d, layer=i, layers=layers) for i in range(layers)]
            each = tuple(x.bits_per_value(d) for x in own)
            assert sum(each) / layers <= budget + 1e-9
            assert sum(each) / layers > budget - max(0.5, 2 / layers) and len(set(each)) <= 2
            assert all(x.key.bits >= x.value.bits for x in own)
            assert last == () or all(a <= b for a, b in zip(last, sorted(each), strict=True))
            last = tuple(sorted(each))
            simulated = from_recipe(recipe, d, layers)
            assert simulated.widths == tuple((x.key.bits, x.value.bits) for x in own)
            assert simulated.bits_per_value(d, d) == pytest.approx(sum(each) / layers)


@pytest.mark.parametrize(("given", "message"), [
    ({"bits": 1.9}, r"^recipe.bits: expected bits a value, all-in, from 2 to 9; got 1.9"),
    ({"bits": float("nan")}, r"^recipe.bits: expected bits a value, all-in, from 2 to 9; got nan"),
    ({"bits": "4"}, r"^recipe.bits: expected bits a value, all-in, from 2 to 9; got '4'"),
    ({"bits": True}, r"^recipe.bits: expected bits a value, all-in, from 2 to 9; got True"),
    ({"bits": 3.25, "value": Side(bits=3)}, r"^recipe.bits: expected without bits of a side; got recipe.value.bits 3"),
    (
        {"bits": 3.25, "value": Side(levels="uniform")},
        r"^recipe.bits: expected with lloyd_max or trellis levels; got .*uniform",
    ),
    ({"bits": 3.25, "seal": "never"}, r"^recipe.bits: expected with a recipe that seals; got recipe.seal never"),
])  # fmt: skip
def test_budgets_that_are_none_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**given)


def test_a_budget_that_head_dims_do_not_allow_is_refused(tmp_path: Path) -> None:
    message = r"^recipe.bits: expected at least 2.375 at head dim 64; got 2.3"
    for make in (
        lambda recipe: recipe.at(64),
        lambda recipe: _core.Cache(recipe, kv_heads=1, head_dim_k=64, head_dim_v=64),
        lambda recipe: _core.PageFormat(recipe, dtype="float32", kv_heads=1, head_dim_k=64, head_dim_v=64),
    ):
        with pytest.raises(ValueError, match=message):
            make(Recipe(bits=2.3))
    with pytest.raises(ValueError, match=r"^recipe.bits: expected widths, or a head dim .* got 3.25"):
        from_recipe(Recipe(bits=3.25))
    with pytest.raises(NotImplementedError, match=r"^recipe.value.bits: expected 4 on Metal; got 2"):
        _core.MetalTables(Recipe(bits=3.25), dtype="float32", kv_heads=1, head_dim_k=128, head_dim_v=128)
    Recipe(bits=3.25, refined=1).to_file(tmp_path / "r.json")
    assert Recipe.from_file(tmp_path / "r.json") == Recipe(bits=3.25, refined=1)
    assert "bits" not in Recipe().to_dict()


def test_a_cache_of_a_budget_is_that_of_its_widths() -> None:
    torch.manual_seed(1)
    rows = torch.randn(1, HEADS, 4 + 3 * PAGE + 64, 128)
    out = []
    for recipe in (Recipe(bits=3.25), Recipe().with_bits(4, 2)):
        core = _core.Cache(recipe, kv_heads=HEADS, head_dim_k=128, head_dim_v=128)
        core.append(rows, rows)
        out.append(torch.empty_like(rows))
        core.attend(rows, out[-1])
        core.seal()
        core.attend(rows[:, :, :1], out[-1][:, :, :1].clone())
        assert core.page_codes(0, 0, 0)[1].__len__() == 8 * 2 * 128
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)


def test_layers_of_a_model_share_a_budget(tmp_path: Path) -> None:
    model, _ = tiny_model.load(tiny_model.save(tmp_path / "model"))
    ids = torch.arange(300)[None] % 50
    with pytest.raises(ValueError, match=r"recipe.bits: expected at least 2.375 at head dim 64; got 2.25"):
        attach(model, Recipe(bits=2.25))
    attach(model, Recipe(bits=4))
    try:
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        widths = [(x.recipe.key.bits, x.recipe.value.bits) for x in cache.packed_layers()]
        assert sorted(widths) == [(4, 3), (4, 3), (4, 3)]  # a quarter of three layers is none
        cache.save(tmp_path / "cache")
        back = KV4Cache.load(tmp_path / "cache", model.config)
        assert back.recipe == Recipe(bits=4)
        assert [(x.recipe.key.bits, x.recipe.value.bits) for x in back.packed_layers()] == widths
        attach(model, Recipe(bits=4.1))
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        widths = [(x.recipe.key.bits, x.recipe.value.bits) for x in cache.packed_layers()]
        assert sorted(widths) == [(4, 3), (4, 3), (4, 4)]
        # A cache that has seen nothing yet has its budget still.
        empty = KV4Cache(model.config, Recipe(bits=4.1))
        empty.save(tmp_path / "empty")
        back = KV4Cache.load(tmp_path / "empty", model.config)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, past_key_values=back)
        assert [(x.recipe.key.bits, x.recipe.value.bits) for x in back.packed_layers()] == widths
    finally:
        detach(model)
