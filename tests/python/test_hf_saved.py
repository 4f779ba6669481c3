"""KV4Cache.save and load: what was loaded goes on as what was never saved; files that do not fit are refused."""

from __future__ import annotations

import copy
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import hf_cases
from hf_cases import (
    DIM,
    KV_HEADS,
    left_padded,
    one_thread,  # noqa: F401, a fixture
    tokens_of,
)
from kv4 import Recipe, Side
from kv4.hf import KV4Cache

# The core alone has more of them (tests/cpp/save_case.h).
RECIPES = {
    "kv4": Recipe(),
    "exact": Recipe.exact(),
    "paper": Recipe.paper(),
    "other": Recipe(
        key=Side(rotation="srht", seed=3, mean=True, lambda_="given"), value=Side(group=32), sinks=0, window=0
    ),
}


def given(recipe: Recipe) -> dict[str, torch.Tensor]:
    return (
        {"lambda_k": torch.linspace(0.5, 2, KV_HEADS * DIM).view(KV_HEADS, DIM)} if recipe == RECIPES["other"] else {}
    )


def attached(name: str) -> PreTrainedModel:
    model = copy.deepcopy(hf_cases.model_of(name))
    model.set_attn_implementation("kv4")
    return model


@torch.no_grad()
def step(model: PreTrainedModel, cache: KV4Cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("seal", [True, False])
def test_loaded_goes_on_bit_for_bit(tmp_path: Path, name: str, recipe: Recipe, seal: bool):
    """A ragged batch, saved after its prompt, while the newest tokens are exact, and with pages of several ages."""
    model = attached(name)
    cache = KV4Cache(model.config, recipe, **given(recipe))
    inputs = left_padded(3, 150)
    mask = inputs["attention_mask"]
    step(model, cache, inputs["input_ids"], mask)
    twin, path = copy.deepcopy(cache), tmp_path / "session.kv4"
    for tokens in (1, 30, 1, 100, 1):
        before = state_of(twin)
        twin.save(path, seal=seal)
        assert state_of(twin) == before
        twin = KV4Cache.load(path, model.config, **given(recipe))
        assert state_of(twin) == state_of(settled(cache) if seal else cache)
        assert twin.get_seq_length() == cache.get_seq_length() == mask.shape[1]
        mask = torch.cat([mask, torch.ones(3, tokens, dtype=mask.dtype)], 1)
        ids = tokens_of(3, tokens, seed=tokens)
        assert torch.equal(step(model, twin, ids, mask), step(model, cache, ids, mask))
    assert list(tmp_path.iterdir()) == [path]


def state_of(cache: KV4Cache) -> list[dict]:
    return [entry | {"nbytes": None} for entry in cache.describe()]


def settled(cache: KV4Cache) -> KV4Cache:
    twin = copy.deepcopy(cache)
    for layer in twin.packed_layers():
        layer.core.seal()
    return twin


def test_another_process_goes_on(tmp_path: Path):
    """Greedy text and its logits, from a process that has the model and the file alone."""
    model = attached("qwen3")
    cache = KV4Cache(model.config)
    ids = tokens_of(1, 200)
    step(model, cache, ids, torch.ones_like(ids))
    cache.save(tmp_path / "session")
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
import torch
import test_hf_saved as t
torch.set_num_threads(1)
model = t.attached("qwen3")
torch.save(t.logits_of(model, t.KV4Cache.load({str(tmp_path / "session")!r}, model.config)), {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(torch.load(tmp_path / "out"), logits_of(model, cache))


def logits_of(model: PreTrainedModel, cache: KV4Cache) -> torch.Tensor:
    logits, mask = [], torch.ones(1, 200, dtype=torch.long)
    ids = tokens_of(1, 1, seed=9)
    for _ in range(20):
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
        logits.append(step(model, cache, ids, mask))
        ids = logits[-1].argmax(-1)
    return torch.cat(logits, 1)


def test_a_sealed_file_is_small_and_an_unsealed_one_crops_exactly(tmp_path: Path):
    model = attached("qwen3")
    cache = KV4Cache(model.config)
    ids = tokens_of(1, 900)
    step(model, cache, ids, torch.ones_like(ids))
    cache.save(tmp_path / "sealed")
    cache.save(tmp_path / "whole", seal=False)
    assert (tmp_path / "sealed").stat().st_size < (tmp_path / "whole").stat().st_size / 3
    whole = KV4Cache.load(tmp_path / "whole", model.config)
    for either in (whole, cache):
        either.crop(-500)
    assert torch.equal(whole.layers[0].keys, cache.layers[0].keys)


def test_beams_share_pages_in_the_file(tmp_path: Path):
    model = attached("qwen3")
    cache = KV4Cache(model.config, Recipe(sinks=0, window=0))
    ids = tokens_of(1, 640)
    step(model, cache, ids, torch.ones_like(ids))
    step(model, cache, ids[:, :1], torch.ones(1, 641, dtype=torch.long))  # seals the prompt once for all
    cache.save(tmp_path / "one")
    cache.reorder_cache(torch.tensor([0, 0, 0, 0]))
    cache.save(tmp_path / "four")
    assert (tmp_path / "four").stat().st_size < 1.5 * (tmp_path / "one").stat().st_size
    again = KV4Cache.load(tmp_path / "four", model.config)
    assert torch.equal(again.layers[1].values, cache.layers[1].values)
    assert again.nbytes() < 1.5 * cache.nbytes()


def test_an_empty_cache_and_past_recording(tmp_path: Path):
    model = attached("gemma3")
    cache = KV4Cache(model.config)
    cache.save(tmp_path / "empty")
    assert not KV4Cache.load(tmp_path / "empty", model.config).is_initialized
    cache.activate_past_recording()
    ids = tokens_of(2, 200)
    step(model, cache, ids, torch.ones_like(ids))
    cache.save(tmp_path / "recording")
    again = KV4Cache.load(tmp_path / "recording", model.config)
    assert all(layer.record_past for layer in again.packed_layers())
    more = tokens_of(2, 90)
    for either in (cache, again):
        step(model, either, more, torch.ones(2, 290, dtype=torch.long))
        either.crop(-200)  # past the sliding window
    assert torch.equal(again.layers[0].keys, cache.layers[0].keys)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = attached("qwen3")
    cache = KV4Cache(model.config)
    ids = tokens_of(1, 80)
    step(model, cache, ids, torch.ones_like(ids))
    path = tmp_path / "session"
    cache.save(path)
    before = path.read_bytes()
    step(model, cache, ids, torch.ones(1, 160, dtype=torch.long))

    def full(write):
        write(b"something")
        raise OSError(28, "No space left on device")

    second = type("Core", (), {"save": staticmethod(full), "set_stream": None})()
    monkeypatch.setattr(cache.layers[1], "core", second)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path, seal=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "nowhere" / "session")


def saved_bytes(tmp_path: Path, recipe: Recipe | None = None, name: str = "qwen3") -> tuple[PreTrainedModel, bytes]:
    model = attached(name)
    cache = KV4Cache(model.config, recipe, **(given(recipe) if recipe else {}))
    ids = tokens_of(1, 150)
    step(model, cache, ids, torch.ones_like(ids))
    cache.save(tmp_path / "good")
    return model, (tmp_path / "good").read_bytes()


def refused(tmp_path: Path, data: bytes, model: PreTrainedModel, begins: str, **arguments) -> None:
    (tmp_path / "other").write_bytes(data)
    config = arguments.pop("config", model.config)
    with pytest.raises(ValueError, match="expected .*; got ") as raised:
        KV4Cache.load(tmp_path / "other", config, **arguments)
    assert str(raised.value).startswith(begins), raised.value


def test_damaged_files_are_refused(tmp_path: Path):
    model, good = saved_bytes(tmp_path)
    for at in (*range(0, 400, 7), *range(400, len(good), 997), len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x10
        refused(tmp_path, bytes(bad), model, "")
    for size in (0, 7, 8, 19, 20, 21, 300, 500, len(good) // 2, len(good) - 1):
        refused(tmp_path, good[:size], model, "")
    refused(tmp_path, b"x" + good, model, "path: expected a file of KV4Cache.save; got other bytes in ")
    refused(
        tmp_path, good + b"x", model, "path: expected the end of the file behind its last layer; got more bytes in "
    )
    refused(tmp_path, good[:8] + b"\2" + good[9:], model, "path: expected a file of version 1; got version 2 in ")
    refused(
        tmp_path, good[:12] + b"\xff" * 8 + good[20:], model, "path: expected a header of at most 16777216 bytes; got"
    )


def with_header(good: bytes, change) -> bytes:
    """The file with another header, under a right checksum."""
    size = struct.unpack_from("<Q", good, 12)[0]
    header = json.loads(good[20 : 20 + size])
    text = json.dumps(change(header) or header).encode()
    front = good[:12] + struct.pack("<Q", len(text)) + text
    return front + struct.pack("<I", zlib.crc32(front)) + good[20 + size + 4 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: ["a list"],
        lambda h: {"layers": h["layers"]},
        lambda h: h["layers"].append(7),
        lambda h: h["layers"][0].update(dtype="int4"),
        lambda h: h["layers"][0].update(dims=[2, 32]),
        lambda h: h["layers"][0].update(dims=[2, 32, -1]),
        lambda h: h["layers"][0].update(dims=[2, 32, 1 << 40]),
        lambda h: h["layers"][0].update(dims=[2, 64, 64]),
        lambda h: h["layers"][0].update(record_past=None),
        lambda h: h["layers"][0].pop("dims") and None,
        lambda h: h["layers"][0].pop("dtype") and None,
        lambda h: h["recipe"].update(sinks="many"),
        lambda h: h["recipe"].update(format="another"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, change):
    model, good = saved_bytes(tmp_path)
    refused(tmp_path, with_header(good, change), model, "")


def test_what_does_not_fit_is_named(tmp_path: Path):
    model, good = saved_bytes(tmp_path)
    refused(tmp_path, good, model, "recipe.sinks: expected 3; got 4", recipe=Recipe(sinks=3))
    refused(tmp_path, good, model, "recipe.value.seed: expected 1; got 7042612", recipe=Recipe(value=Side(seed=1)))
    refused(
        tmp_path, good, model, "config: expected 2 layers, as the file has; got 3", config=config(num_hidden_layers=3)
    )
    refused(tmp_path, good, model, "device: expected the CPU", device="meta")
    refused(tmp_path, good, model, "device: expected one device, or 2 of them; got 3", device=["cpu"] * 3)
    sliding = attached("gemma3")
    refused(
        tmp_path,
        good,
        model,
        "layers[0].type: expected 'sliding_attention'; got 'full_attention'",
        config=sliding.config,
    )
    model, good = saved_bytes(tmp_path, RECIPES["other"])
    lambda_k = given(RECIPES["other"])["lambda_k"]
    refused(tmp_path, good, model, "lambda_k: expected values of CRC-32C ", lambda_k=lambda_k * 2)
    refused(tmp_path, good, model, "lambda_k: expected 2 x 32 values; got 0 values")
    with pytest.raises(FileNotFoundError):
        KV4Cache.load(tmp_path / "nowhere", model.config)


def config(**changes) -> transformers.PretrainedConfig:
    return hf_cases.model_of("qwen3", **changes).config


def test_layers_of_transformers_are_saved_by_their_tensors(tmp_path: Path):
    cache = KV4Cache(config())
    cache.layers.append(transformers.cache_utils.DynamicLayer())
    cache.layers[-1].update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    cache.layers[-1].odd = object()
    with pytest.raises(NotImplementedError, match=r"layers\[2\].odd: expected tensors, numbers.*; got object"):
        cache.save(tmp_path / "held")
    assert not (tmp_path / "held").exists()


def test_the_core_reads_and_writes_as_files_do():
    """Short reads are asked again; what a callable raises comes out; the cache is as it was."""
    from kv4 import _core

    settings = {"kv_heads": 1, "head_dim_k": 32, "head_dim_v": 32}
    cache, file = _core.Cache(Recipe(), **settings), io.BytesIO()
    cache.append(torch.randn(1, 1, 140, 32), torch.randn(1, 1, 140, 32))
    cache.seal()
    cache.save(file.write)
    file.seek(0)

    class Short:
        def __call__(self, view: memoryview) -> int:
            return file.readinto(view[:7])

    again = _core.Cache(Recipe(), **settings)
    again.load(Short())
    assert again.length == 140 and file.read() == b""
    assert again.page_codes(0, 0, 0) == cache.page_codes(0, 0, 0)
    with pytest.raises(RuntimeError, match=r"cache: expected an empty cache \(reset empties it\); got 1 sequences"):
        again.load(file.readinto)

    def broken(view: memoryview) -> int:
        raise KeyError("of the caller")

    fresh = _core.Cache(Recipe(), **settings)
    for call in (lambda: fresh.load(broken), lambda: cache.save(broken)):
        with pytest.raises(KeyError, match="of the caller"):
            call()
    for answer in (None, "seven", -1, 1 << 40, 0):
        with pytest.raises(ValueError, match="readinto: expected 8 bytes more; got"):
            fresh.load(lambda view, answer=answer: answer)
    assert fresh.batch == 0 and cache.length == 140
