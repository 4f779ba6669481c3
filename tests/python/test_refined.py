"""Refined keys in Python: recipes, the packed cache against its simulation, what a refined key does for its token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_model
from kv4 import Recipe, Side, _core
from kv4.bench.text import python_reference
from kv4.calibration import identity_of, load
from kv4.evaluate.layers import calibrate
from kv4.evaluate.quality import Candidate, measure_all
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.variant import from_recipe
from kv4.evaluate.windows import cut
from kv4.hf import KV4Cache, attach, detach


def test_recipes_say_how_many_keys_are_refined(tmp_path: Path) -> None:
    assert "refined" not in Recipe().to_dict()  # what reads such a file need not know of it
    recipe = Recipe(refined=2).with_bits(3, 4)
    assert recipe.refined == 2 and recipe.to_dict()["refined"] == 2
    recipe.to_file(tmp_path / "r.json")
    assert Recipe.from_file(tmp_path / "r.json") == recipe
    assert from_recipe(recipe).refined == 2
    for refined in (-1, 3):
        with pytest.raises(ValueError, match=rf"^recipe.refined: expected 0 to 2 keys of a page; got {refined}"):
            Recipe(refined=refined)
    with pytest.raises(ValueError, match=r"^recipe.refined: expected 0 with arrival sealing, which .*; got 1"):
        dataclasses.replace(Recipe.paper(), refined=1)
    with pytest.raises(ValueError, match=r"^recipe.refined: expected int; got '1'"):
        Recipe.from_dict({**Recipe().to_dict(), "refined": "1"})


def _core_of(recipe: Recipe, k: torch.Tensor, v: torch.Tensor) -> _core.Cache:
    """All of k and v [kv_heads, tokens, d] appended, their pages sealed; lambda, if any, fixed by random queries."""
    heads, tokens, d = k.shape
    core = _core.Cache(recipe, kv_heads=heads, head_dim_k=d, head_dim_v=v.shape[-1])
    core.append(k[None], v[None])
    queries = torch.randn(1, 2 * heads, tokens, d)
    core.attend(queries, torch.empty(1, 2 * heads, tokens, v.shape[-1]))
    core.seal()
    return core


def _dense(core: _core.Cache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    read_k, read_v = torch.empty_like(k)[None], torch.empty_like(v)[None]
    core.dense_keys(0, k.shape[1], read_k)
    core.dense_values(0, k.shape[1], read_v)
    return read_k[0], read_v[0]


@pytest.mark.parametrize("refined", [1, 2])
@pytest.mark.parametrize(("bits", "d", "side"), [
    ((4, 4), 64, Side(mean=True)), ((4, 4), 256, Side(mean=True, group=64)), ((3, 4), 80, Side(mean=True)),
    ((8, 2), 128, Side(mean=False)), ((4, 4), 128, Side(mean=True, levels="uniform", scale="abs_max")),
])  # fmt: skip
def test_the_packed_cache_reads_what_is_simulated(refined: int, bits: tuple[int, int], d: int, side: Side) -> None:
    torch.manual_seed(d + refined)
    recipe = Recipe(key=side, refined=refined).with_bits(*bits)
    k, v = (torch.randn(2, 4 + 3 * 64 + 64, d) for _ in range(2))
    core = _core_of(recipe, k, v)
    assert core.page_count(0) == 3
    variant = from_recipe(recipe)
    sealed_k, _ = seal_layer(_Session(variant, None, None), 0, torch.randn(4, k.shape[1], d), k.double(), v.double())
    read, _ = _dense(core, k, v)
    pages = slice(4, 4 + 3 * 64)
    # One code of many may be a level off where it lies on a boundary.
    off = (read[:, pages] - sealed_k[:, : 3 * 64]).norm(dim=-1) / k[:, pages].norm(dim=-1)
    assert off.median() < 1e-4 and off.max() < 0.05
    plain, _ = _dense(_core_of(dataclasses.replace(recipe, refined=0), k, v), k, v)
    for head in range(2):
        for page in range(3):
            places, codes, scales = core.page_second_rows(0, page, head)
            own = v[head, 4 + 64 * page : 68 + 64 * page].double().square().sum(-1)
            assert places == own.argsort()[:refined].tolist()
            assert len(codes) == refined * d // 2 and (np.frombuffer(scales, np.float16) > 0).all()
            for j in range(64):
                at = 4 + 64 * page + j
                left, before = ((x[head, at] - k[head, at]).norm() for x in (read, plain))
                assert left < 0.5 * before if j in places else torch.equal(read[head, at], plain[head, at])


@pytest.mark.parametrize("refined", [1, 2])
def test_attention_is_that_over_what_is_read_back(refined: int) -> None:
    torch.manual_seed(refined)
    d, heads = 128, 2
    k, v = (torch.randn(heads, 4 + 2 * 64 + 64, d) for _ in range(2))
    recipe = Recipe(refined=refined, key=Side(mean=True)).with_bits(2, 4)
    core = _core_of(recipe, k, v)
    read_k, read_v = _dense(core, k, v)
    plain = _dense(_core_of(dataclasses.replace(recipe, refined=0), k, v), k, v)[0]
    query = torch.zeros(1, heads, 1, d)
    for h in range(heads):  # along what second rows hold: there a score without them is off by some 3
        more = sum(read_k[h, 68 + j] - plain[h, 68 + j] for j in core.page_second_rows(0, 1, h)[0])
        query[0, h, 0] = d**0.5 * more / more.norm()
    last_k, last_v = torch.randn(1, heads, 1, d), torch.randn(1, heads, 1, d)
    core.append(last_k, last_v)
    out = torch.empty(1, heads, 1, d)
    core.attend(query, out)

    def exact(keys: torch.Tensor) -> torch.Tensor:
        keys, values = torch.cat([keys, last_k[0]], 1), torch.cat([read_v, last_v[0]], 1)
        return torch.nn.functional.scaled_dot_product_attention(query[0].double(), keys.double(), values.double())

    size = exact(read_k).abs().max()
    assert (out[0] - exact(read_k)).abs().max() < 1e-3 * size
    assert (out[0] - exact(plain)).abs().max() > 0.1 * size


def test_masked_tokens_and_rows_with_nan_are_never_refined() -> None:
    torch.manual_seed(5)
    d, tokens = 64, 4 + 64 + 64
    k, v = (torch.randn(1, 1, tokens, d) for _ in range(2))
    v[0, 0, [24, 29, 34]] *= torch.tensor([0.0, 0.01, 0.02])[:, None]
    v[0, 0, 24, 3] = k[0, 0, 24, 5] = float("nan")
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    seen[..., [24, 29]] = False  # no query sees the lightest two
    core = _core.Cache(Recipe(refined=2, key=Side(mean=True)), kv_heads=1, head_dim_k=d, head_dim_v=d)
    core.append(k, v)
    queries = torch.randn(1, 1, tokens, d)
    core.attend(queries, torch.empty_like(queries), mask=seen)
    core.seal()
    places, codes, scales = core.page_second_rows(0, 0, 0)
    assert places[0] == 30 and places[1] not in (20, 25, 30)  # of the page, which begins behind 4 sinks
    read, _ = _dense(core, k[0], v[0])
    assert torch.isfinite(read).all()
    # One token that is not masked, and then none for the second row.
    seen[..., 4:68] = False
    seen[..., 40] = True
    core = _core.Cache(Recipe(refined=2, key=Side(mean=True)), kv_heads=1, head_dim_k=d, head_dim_v=d)
    core.append(k, v)
    core.attend(queries, torch.empty_like(queries), mask=seen)
    core.seal()
    places, codes, scales = core.page_second_rows(0, 0, 0)
    scales = np.frombuffer(scales, np.float16)
    assert places == [36, 0] and scales[0] >= 0 and scales[1] == 0 and codes[d // 2 :] == b"\x88" * (d // 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = tiny_model.load(folder)
    return model, cut(tokenizer, python_reference(), 2, 600), folder


def test_the_packed_model_loses_what_the_simulated_one_does(tiny: tuple) -> None:
    model, windows, _ = tiny
    recipes = {f"{n} {bits}": Recipe(refined=n).with_bits(bits, 8) for n in (0, 2) for bits in (2, 4)}
    candidates = [Candidate(f"packed {name}", recipe) for name, recipe in recipes.items()]
    candidates += [Candidate(f"simulated {name}", from_recipe(recipe)) for name, recipe in recipes.items()]
    found = measure_all(model, windows[1:], candidates)
    for name in recipes:
        packed, simulated = found[f"packed {name}"], found[f"simulated {name}"]
        assert packed.kl == pytest.approx(simulated.kl, rel=0.05)  # queries and weights rounded to 16 bits, ties
    for bits in (2, 4):
        assert found[f"packed 2 {bits}"].kl < found[f"packed 0 {bits}"].kl
        assert found[f"packed 2 {bits}"].cache_bytes > found[f"packed 0 {bits}"].cache_bytes


def test_a_cache_of_transformers_keeps_them(tiny: tuple, tmp_path: Path) -> None:
    model, windows, _ = tiny
    recipe, ids = Recipe(refined=1), windows[0][:, :400]

    def logits(cache: KV4Cache, part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=part, past_key_values=cache, use_cache=True).logits

    attach(model, recipe)
    try:
        with torch.inference_mode():
            own = model(input_ids=ids[:, :300], use_cache=True).past_key_values
        assert own.recipe == recipe
        cache = KV4Cache(model.config, recipe, bits={1: (3, 4)})
        for part in ids[:, :330].split(110, dim=1):
            logits(cache, part)
        assert [x.recipe.refined for x in cache.packed_layers()] == [1, 1, 1]
        assert len(cache.layers[1].core.page_second_rows(0, 0, 0)[0]) == 1
        cache.save(tmp_path / "cache", seal=False)
        again = KV4Cache.load(tmp_path / "cache", model.config)
        assert again.recipe == recipe
        assert again.layers[1].core.page_second_rows(0, 0, 0) == cache.layers[1].core.page_second_rows(0, 0, 0)
        rest = ids[:, 330:]
        assert torch.equal(logits(cache, rest), logits(again, rest))
        for each in (cache, again):
            each.crop(-rest.shape[1])
        assert torch.equal(logits(cache, rest), logits(again, rest))
        with pytest.raises(ValueError, match=r"^recipe"):
            KV4Cache.load(tmp_path / "cache", model.config, Recipe())
    finally:
        detach(model)


def test_a_calibration_gives_them_to_the_packed_cache(tiny: tuple, tmp_path: Path) -> None:
    model, windows, folder = tiny
    made = calibrate(model, windows[:1], bits=(3.5,), refined=1, identity=identity_of(folder), text="a text")
    made.save(tmp_path / "layers.safetensors")
    back = load(tmp_path / "layers.safetensors", folder)
    assert back.refined == 1 and back.recipe == Recipe()
    assert back.arguments() == {"recipe": Recipe(refined=1), "bits": back.widths_of(3.5)}
    attach(model, **back.arguments())
    try:
        with torch.inference_mode():
            cache = model(input_ids=windows[0][:, :300], use_cache=True).past_key_values
        assert all(x.recipe.refined == 1 for x in cache.packed_layers())
    finally:
        detach(model)


def test_what_has_no_kernels_for_them_refuses_them() -> None:
    recipe = Recipe(refined=1)
    with pytest.raises(NotImplementedError, match=r"^recipe.refined: expected 0 on Metal; got 1"):
        _core.MetalTables(recipe, dtype="float32", kv_heads=1, head_dim_k=64, head_dim_v=64)
