"""Lambda of a server's layers: a calibration that fits, and what one start keeps for the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kv4 import Recipe
from kv4.calibration import Calibration
from kv4.vllm.lambdas import Kept, check_fit, digest_of, own_heads
from kv4.vllm.settings import calibration_of, recipe_of

GIVEN = dataclasses.replace(Recipe(), key=dataclasses.replace(Recipe().key, lambda_="given"))


def calibration(layers: int = 2, heads: int = 2, dim: int = 64, recipe: Recipe = GIVEN) -> Calibration:
    x = torch.arange(1, heads * dim + 1).reshape(heads, dim).float()
    return Calibration({f"layer.{i}.key.lambda": x + i for i in range(layers)}, recipe, {})


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KV4_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_a_calibration_brings_its_own_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration_of({}) is None
    calibration().save(folder / "a.safetensors")
    given = {"kv4": {"calibration": str(folder / "a.safetensors")}}
    assert recipe_of(given) == GIVEN
    monkeypatch.setenv("KV4_VLLM_CALIBRATION", str(folder / "a.safetensors"))
    found = calibration_of({})
    assert found is not None and torch.equal(found.lambda_of("key", 1), calibration().lambda_of("key", 1))
    with pytest.raises(
        ValueError, match="additional_config.kv4.recipe: expected none beside a calibration.* got exact"
    ):
        recipe_of({"kv4": {"recipe": "exact"}})


def test_a_calibration_that_is_none_is_refused_by_name(folder: Path) -> None:
    (folder / "text.safetensors").write_text("no such thing")
    calibration().save(folder / "cut.safetensors")
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-7])
    dense = dataclasses.replace(Recipe(), key=dataclasses.replace(Recipe().key, rotation="dense", lambda_="none"))
    calibration(recipe=dense).save(folder / "dense.safetensors")
    for name in ("nowhere", "text", "cut", "dense"):
        with pytest.raises(ValueError, match="additional_config.kv4.calibration"):
            recipe_of({"kv4": {"calibration": str(folder / f"{name}.safetensors")}})
    with pytest.raises(ValueError, match=r"additional_config.kv4.calibration: expected a name or a file; got 3"):
        recipe_of({"kv4": {"calibration": 3}})


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "message"),
    [
        (3, 2, 64, "calibration: expected one of a model of 3 layers; got 2"),
        (2, 4, 64, r"calibration: layer.0.key.lambda: expected \[4, 64\]; got \[2, 64\]"),
        (2, 2, 128, r"calibration: layer.0.key.lambda: expected \[2, 128\]; got \[2, 64\]"),
    ],
)
def test_a_calibration_of_another_shape_is_refused(layers: int, heads: int, dim: int, message: str) -> None:
    check_fit(calibration(), 2, 2, 64, "a/name")
    with pytest.raises(ValueError, match=message):
        check_fit(calibration(), layers, heads, dim, "a/name")


def test_ranks_share_heads_out_or_hold_the_same_one() -> None:
    assert [list(range(8))[own_heads(8, r, 4)] for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(range(2))[own_heads(2, r, 4)] for r in range(4)] == [[0], [0], [1], [1]]


def test_what_is_kept_comes_back_to_the_same_model_recipe_and_rank_alone() -> None:
    found = np.linspace(0.5, 2, 128, dtype=np.float32).reshape(2, 64)
    kept = Kept("model", Recipe(), "layers.0.attn", 0, 1)
    kept.save(found)
    back = Kept("model", Recipe(), "layers.0.attn", 0, 1).load(2, 64)
    assert back is not None and (back == found).all()
    others = [
        Kept("other", Recipe(), "layers.0.attn", 0, 1),
        Kept("model", Recipe(sinks=8), "layers.0.attn", 0, 1),
        Kept("model", Recipe(), "layers.1.attn", 0, 1),
        Kept("model", Recipe(), "layers.0.attn", 0, 2),
    ]
    assert [x.load(2, 64) for x in others] == [None] * 4
    assert list(kept.path.parent.iterdir()) == [kept.path]


@pytest.mark.parametrize("damage", ["cut", "shape", "dtype", "negative", "nan", "pickle"])
def test_a_file_that_does_not_fit_is_measured_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept("model", Recipe(), "layers.0.attn", 0, 1)
    good = np.ones((2, 64), np.float32)
    bad = {
        "shape": good[:1],
        "dtype": good.astype(np.float64),
        "negative": -good,
        "nan": good * np.nan,
        "pickle": np.array([{}]),
    }.get(damage, good)
    kept.path.parent.mkdir(parents=True)
    np.save(kept.path, bad, allow_pickle=True)
    if damage == "cut":
        kept.path.write_bytes(kept.path.read_bytes()[:-9])
    assert kept.load(2, 64) is None and str(kept.path) in caplog.text
    kept.save(good)
    assert kept.load(2, 64) is not None


def test_a_folder_that_cannot_be_written_is_said_and_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cache").mkdir()
    (folder / "cache/vllm").write_text("a file where the folder should be")
    Kept("model", Recipe(), "layers.0.attn", 0, 1).save(np.ones((2, 64), np.float32))
    assert "lambda is not kept for the next start" in caplog.text


def test_models_differ_by_weights_and_by_name(folder: Path) -> None:
    named = [("a/name", None, "{}"), ("b/name", None, "{}"), ("a/name", "v2", "{}"), ("a/name", None, '{"hidden": 1}')]
    digests = {digest_of(*model) for model in named}
    gguf = folder / "model.gguf"
    for content in (b"one", b"two", b"two and more"):
        gguf.write_bytes(content)
        digests.add(digest_of(str(gguf), None, "{}"))
    assert len(digests) == 7
