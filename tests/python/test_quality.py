"""The measurement of quality, and a short form of what it must find.

The figures of the README come from `kv4 eval` on whole texts; docs/quality.md has the commands.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_model
from kv4 import Recipe
from kv4.bench.text import python_reference
from kv4.evaluate import Quality, measure, quality


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    return _load(folder)


def _load(folder: Path) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_an_exact_cache_is_no_distance_away(tiny: tuple) -> None:
    found = measure(*tiny, python_reference(), Recipe.exact(), windows=2, length=300)
    assert abs(found.kl) < 1e-6
    assert found.top1 == 1.0
    assert found.ppl == pytest.approx(found.ppl_exact, rel=1e-5)
    assert found.cache_bytes > found.fp16_bytes


def test_perplexity_is_the_cross_entropy_of_second_halves(tiny: tuple) -> None:
    model, tokenizer = tiny
    text = python_reference()
    found = measure(model, tokenizer, text, Recipe.exact(), windows=1, length=200)
    # A window is the start token and 199 tokens of text; positions 100 ... 198 predict their successors.
    ids = tokenizer(text[:199], return_tensors="pt").input_ids
    assert ids.shape[1] == 200
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, 100:199], ids[0, 101:200])
    assert found.ppl_exact == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.windows[0].scored == 99


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper()], ids=["kv4", "paper"])
def test_calls_of_64_tokens_score_what_single_tokens_do(
    tiny: tuple, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = measure(*tiny, python_reference(), recipe, windows=1, length=400)
    monkeypatch.setattr(quality, "CALL", 1)
    one = measure(*tiny, python_reference(), recipe, windows=1, length=400)
    assert many.kl > 1e-6, "nothing was sealed"
    assert many.kl == pytest.approx(one.kl, rel=0.02)
    assert many.ppl == pytest.approx(one.ppl, rel=1e-3)


def test_standard_errors(tiny: tuple) -> None:
    found = measure(*tiny, python_reference(), windows=3, length=260)
    kls = torch.tensor([window.kl / window.scored for window in found.windows], dtype=torch.float64)
    assert found.kl == pytest.approx(float(kls.mean()))
    assert found.kl_se == pytest.approx(float(kls.std() / math.sqrt(3)))
    assert math.isnan(measure(*tiny, python_reference(), windows=1, length=64).kl_se)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"windows": 0}, "windows"), ({"length": 3}, "length"), ({"windows": 1000, "length": 4096}, "text")],
)
def test_bad_input(tiny: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        measure(*tiny, python_reference(), **options)


def test_progress_counts_every_token_twice(tiny: tuple) -> None:
    done = []
    measure(*tiny, python_reference(), windows=2, length=100, progress=done.append)
    assert sum(done) == 2 * 2 * 100


@pytest.fixture(scope="module")
def gemma() -> tuple:
    from kv4.models import list_models

    info = next(info for info in list_models() if info.name == "gemma-3-270m")
    if not info.pulled:
        pytest.skip("gemma-3-270m is not here: kv4 pull gemma-3-270m")
    return _load(info.folder)


def test_gemma_stays_close_where_the_paper_s_recipe_does_not(gemma: tuple) -> None:
    found: dict[str, Quality] = {
        name: measure(*gemma, python_reference(), recipe, windows=1, length=1024)
        for name, recipe in {"kv4": Recipe(), "paper": Recipe.paper()}.items()
    }
    kv4, paper = found["kv4"], found["paper"]
    # The published comparison of the two recipes is a factor of 20; one short window leaves room for chance.
    assert 0 < kv4.kl < paper.kl / 5
    assert kv4.top1 > paper.top1
    assert abs(kv4.dppl) < abs(paper.dppl)
    assert kv4.cache_bytes < kv4.fp16_bytes
