"""Levels of a trellis: paths of least error, the packed cache against its simulation, transformers' caches."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

import tiny_model
from kv4 import Recipe, Side, _core
from kv4.bench.text import python_reference
from kv4.evaluate import trellis
from kv4.evaluate.fake import seal
from kv4.evaluate.layers import calibrate
from kv4.evaluate.quality import Candidate, measure_all
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.variant import SideVariant, from_recipe
from kv4.evaluate.windows import cut
from kv4.hf import KV4Cache, attach, detach


def _level(bits: int, before: int, code: int) -> int:
    return _core.trellis_levels(bits)[before % 4][code]


@pytest.mark.parametrize(("bits", "places"), [(2, 4), (3, 3), (4, 2)])
def test_a_path_is_the_best_of_all(bits: int, places: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    y = 60 * torch.randn(3, 4 * places, generator=generator, dtype=torch.float64)
    codes = trellis.encode(y, bits)
    read = trellis.decode(codes, bits, y.dtype)
    for row, chain in itertools.product(range(3), range(4)):
        own = y[row, chain::4].tolist()

        def error(path: tuple[int, ...], own: list[float] = own) -> float:
            levels = [_level(bits, before, code) for before, code in zip((0, *path), path, strict=False)]
            return sum((a - b) ** 2 for a, b in zip(own, levels, strict=True))

        best = min(error(path) for path in itertools.product(range(2**bits), repeat=places))
        assert error(tuple(codes[row, chain::4].tolist())) == pytest.approx(best)
        assert (y[row, chain::4] - read[row, chain::4]).square().sum().item() == pytest.approx(best)


# docs/notes/bits.md; of values the first of 16 places has no state to choose. At 6 bits there is no trellis.
@pytest.mark.parametrize(("bits", "share", "of_values"), [(2, 0.83, 0.86), (3, 0.72, 0.77), (4, 0.73, 0.78)])
def test_error_of_gaussian_vectors(bits: int, share: float, of_values: float) -> None:
    x = torch.randn(2, 640, 128, generator=torch.Generator().manual_seed(1))
    eye = torch.eye(128, dtype=torch.float64)

    def left(levels: str, bits: int, values: bool) -> float:
        read = seal(x, SideVariant(levels=levels, bits=bits), eye, eye, values=values).rows
        return ((read - x).square().sum() / x.square().sum()).item()

    for values, bound in ((False, share), (True, of_values)):
        assert 4.0**-bits < left("trellis", bits, values) < bound * left("lloyd_max", bits, values)
        assert left("trellis", 6, values) == left("lloyd_max", 6, values)


def test_chains_begin_anew_in_every_page_and_group() -> None:
    eye = torch.eye(128, dtype=torch.float64)
    x = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(2))
    other = x.clone()
    other[:, :64] = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(3))
    side = SideVariant(levels="trellis", group=64)
    mine, its = (seal(rows, side, eye, eye, values=True).codes for rows in (x, other))
    assert torch.equal(mine[:, 64:], its[:, 64:]) and not torch.equal(mine[:, :64], its[:, :64])
    other = x.clone()
    other[..., :64] = 3
    mine, its = (seal(rows, side, eye, eye).codes for rows in (x, other))
    assert torch.equal(mine[..., 64:], its[..., 64:]) and not torch.equal(mine[..., :64], its[..., :64])
    # A key is its own; a value's codes depend on those of tokens before it in its page.
    one = x.clone()
    one[:, 4] += 1
    for values in (False, True):
        mine, its = (seal(rows, SideVariant(levels="trellis"), eye, eye, values=values).codes for rows in (x, one))
        same = (mine == its).all(-1)[0]
        assert not same[4] and same[5] and same[64:].all()
        assert same[8] != values


def _core_of(recipe: Recipe, k: torch.Tensor, v: torch.Tensor) -> _core.Cache:
    heads, tokens, d = k.shape
    core = _core.Cache(recipe, kv_heads=heads, head_dim_k=d, head_dim_v=v.shape[-1])
    core.append(k[None], v[None])
    core.attend(torch.randn(1, 2 * heads, tokens, d), torch.empty(1, 2 * heads, tokens, v.shape[-1]))
    core.seal()
    return core


def _dense(core: _core.Cache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    read_k, read_v = torch.empty_like(k)[None], torch.empty_like(v)[None]
    core.dense_keys(0, k.shape[1], read_k)
    core.dense_values(0, k.shape[1], read_v)
    return read_k[0], read_v[0]


@pytest.mark.parametrize(("bits", "d", "group", "refined"), [
    ((4, 4), 128, 0, 0), ((4, 4), 96, 32, 1), ((2, 3), 64, 0, 0), ((3, 2), 256, 64, 2), ((6, 4), 80, 0, 0),
])  # fmt: skip
def test_the_packed_cache_reads_what_is_simulated(bits: tuple[int, int], d: int, group: int, refined: int) -> None:
    torch.manual_seed(d)
    sides = (Side(mean=True, levels="trellis", group=group), Side(levels="trellis", group=group))
    recipe = Recipe(*sides, refined=refined).with_bits(*bits)
    assert [x.levels for x in (recipe.key, recipe.value)] == ["trellis" if b <= 4 else "lloyd_max" for b in bits]
    k, v = (torch.randn(2, 4 + 3 * 64 + 64, d) for _ in range(2))
    core = _core_of(recipe, k, v)
    assert core.page_count(0) == 3
    session = _Session(from_recipe(recipe), None, None)
    sealed = seal_layer(session, 0, torch.randn(4, k.shape[1], d), k.double(), v.double())
    pages = slice(4, 4 + 3 * 64)
    for read, simulated, rows in zip(_dense(core, k, v), sealed, (k, v), strict=True):
        off = (read[:, pages] - simulated[:, : 3 * 64]).norm(dim=-1) / rows[:, pages].norm(dim=-1)
        assert off.median() < 1e-4  # paths that leave the same may differ
        left = [(x - rows[:, pages]).square().sum() for x in (read[:, pages], simulated[:, : 3 * 64])]
        assert left[0].item() == pytest.approx(left[1].item(), rel=2e-3)


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 2)])
def test_attention_is_that_over_what_is_read_back(bits: tuple[int, int]) -> None:
    torch.manual_seed(sum(bits))
    d, heads = 128, 2
    k, v = (torch.randn(heads, 4 + 3 * 64 + 64, d) for _ in range(2))
    core = _core_of(dataclasses.replace(Recipe.trellis(), key=Side(mean=True, levels="trellis")).with_bits(*bits), k, v)
    read_k, read_v = _dense(core, k, v)
    query, last_k, last_v = (torch.randn(1, heads, 1, d) for _ in range(3))
    core.append(last_k, last_v)
    out = torch.empty(1, heads, 1, d)
    core.attend(query, out)
    keys, values = torch.cat([read_k, last_k[0]], 1), torch.cat([read_v, last_v[0]], 1)
    want = torch.nn.functional.scaled_dot_product_attention(query[0].double(), keys.double(), values.double())
    assert (out[0] - want).abs().max() < 1e-3 * want.abs().max()


def test_what_has_no_trellis_is_refused() -> None:
    value = Side(levels="trellis")
    with pytest.raises(ValueError, match=r"^recipe.value.levels: expected lloyd_max with 6 bits; got trellis"):
        Recipe(value=dataclasses.replace(value, bits=6))
    with pytest.raises(
        ValueError, match=r"^recipe.value.scale: expected least_squares with trellis levels; got abs_max"
    ):
        Recipe(value=dataclasses.replace(value, scale="abs_max"))
    with pytest.raises(ValueError, match=r"^recipe.value.levels: expected .* with arrival sealing, .*; got trellis"):
        dataclasses.replace(Recipe.paper(), value=value)
    with pytest.raises(ValueError, match=r"^stored: expected fp16 with a trellis; got bytes"):
        SideVariant(levels="trellis", stored="bytes")
    with pytest.raises(ValueError, match=r"^bits: expected one of 2, 3, 4 with a trellis; got 6"):
        trellis.encode(torch.randn(1, 8), 6)
    with pytest.raises(ValueError, match=r"^y: expected values of floating point; got torch.int64"):
        trellis.encode(torch.arange(8), 4)
    with pytest.raises(ValueError, match=r"^codes: expected 0 to 3; got 0 to 7"):
        trellis.decode(torch.arange(8), 2)
    with pytest.raises(ValueError, match=r"levels: expected lloyd_max with 6 bits; got trellis"):
        _core.trellis_levels(6)
    with pytest.raises(
        NotImplementedError, match=r"^recipe.key.levels: expected lloyd_max or uniform on Metal; got tr"
    ):
        _core.MetalTables(Recipe.trellis(), dtype="float32", kv_heads=1, head_dim_k=64, head_dim_v=64)


def test_recipes_by_name_budget_and_file(tmp_path: Path) -> None:
    recipe = Recipe.trellis(refined=1)
    assert (recipe.key.levels, recipe.value.levels, recipe.refined) == ("trellis", "trellis", 1)
    assert recipe.key.mean and recipe.key.lambda_ == "auto"
    recipe.to_file(tmp_path / "r.json")
    assert Recipe.from_file(tmp_path / "r.json") == recipe
    assert recipe.bits_per_value(128) == Recipe(refined=1).bits_per_value(128)
    budget = dataclasses.replace(Recipe.trellis(), bits=3.25).at(128)
    assert (budget.key.bits, budget.value.bits) == (4, 2)
    assert budget.key.levels == budget.value.levels == "trellis"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = tiny_model.load(folder)
    return model, cut(tokenizer, python_reference(), 2, 600)


def test_the_packed_model_loses_what_the_simulated_one_does(tiny: tuple) -> None:
    model, windows = tiny
    recipes = {str(bits): Recipe.trellis().with_bits(*bits) for bits in ((2, 2), (4, 4))}
    candidates = [Candidate(f"packed {name}", recipe) for name, recipe in recipes.items()]
    candidates += [Candidate(f"simulated {name}", from_recipe(recipe)) for name, recipe in recipes.items()]
    candidates += [Candidate(f"plain {bits}", Recipe().with_bits(*bits)) for bits in ((2, 2), (4, 4))]
    found = measure_all(model, windows[1:], candidates)
    for name in recipes:
        assert found[f"packed {name}"].kl == pytest.approx(found[f"simulated {name}"].kl, rel=0.05)
        assert found[f"packed {name}"].kl < 0.95 * found[f"plain {name}"].kl
        assert found[f"packed {name}"].cache_bytes == found[f"plain {name}"].cache_bytes


def test_a_cache_of_transformers_keeps_them(tiny: tuple, tmp_path: Path) -> None:
    model, windows = tiny
    ids = windows[0][:, :400]

    def logits(cache: KV4Cache, part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=part, past_key_values=cache, use_cache=True).logits

    attach(model, Recipe.trellis())
    try:
        cache = KV4Cache(model.config, Recipe.trellis(), bits={1: (3, 2), 2: (6, 4)})
        for part in ids[:, :330].split(110, dim=1):
            logits(cache, part)
        assert [(x.recipe.key.levels, x.recipe.value.levels) for x in cache.packed_layers()] == [
            ("trellis", "trellis"), ("trellis", "trellis"), ("lloyd_max", "trellis")
        ]  # fmt: skip
        cache.save(tmp_path / "cache", seal=False)
        again = KV4Cache.load(tmp_path / "cache", model.config)
        cache.crop(-10)
        again.crop(-10)
        assert torch.equal(logits(cache, ids[:, 320:]), logits(again, ids[:, 320:]))
    finally:
        detach(model)


def test_widths_of_layers_are_chosen_for_it(tiny: tuple) -> None:
    model, windows = tiny
    found = calibrate(model, windows[:1], bits=(3.25,), recipe=Recipe.trellis(), refined=1)
    arguments = found.arguments()
    assert arguments["recipe"] == Recipe.trellis(refined=1)
    cache = KV4Cache(model.config, **arguments)
    assert all(x.recipe.refined == 1 for x in cache.packed_layers())
