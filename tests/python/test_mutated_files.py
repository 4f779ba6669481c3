"""Files of any bytes: recipes, calibrations, sessions, GGUF models. Random mutations of whole ones are read, or refused
with one line; nothing else comes out. KV4_FUZZ_SEED makes other mutations, KV4_FUZZ_TIMES more of them: every night
takes new ones. The seed is in the failure."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_cases
from hf_cases import tokens_of
from kv4 import Recipe, calibration
from kv4.hf import KV4Cache
from kv4.models import ModelError
from test_models import tiny_gguf

SEED = int(os.environ.get("KV4_FUZZ_SEED", 22482))
TIMES = int(os.environ.get("KV4_FUZZ_TIMES", 1))


def mutated(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """A few changes to the first `within` bytes: bits, numbers at their limits, pieces out, doubled or cut."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(len(out), within or len(out))
        at = rng.randrange(end) if end else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            number = rng.choice([0, 1, -1, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63)])
            size = rng.choice([4, 8])
            out[at : at + size] = struct.pack("<q", number)[:size]
        elif kind == 3:
            del out[at : at + rng.randint(1, 12)]
        elif kind == 4:
            out[at:at] = out[at : at + rng.randint(1, 12)]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def try_all(times: int, whole: bytes, read: Callable[[bytes], None], refusals: tuple, within: int | None = None):
    """Counts (read, refused) of that many mutations."""
    taken = refused = 0
    for number in range(times * TIMES):
        data = mutated(whole, random.Random(SEED + number), within)
        try:
            read(data)
            taken += 1
        except refusals as refusal:
            said = str(refusal)
            assert "expected" in said and "got" in said, f"KV4_FUZZ_SEED={SEED}, number {number}: {refusal!r}"
            assert "\n" not in said, f"KV4_FUZZ_SEED={SEED}, number {number}: {said}"
            refused += 1
        except BaseException as other:
            raise AssertionError(f"KV4_FUZZ_SEED={SEED}, number {number}: {other!r}") from other
    assert refused > 0
    return taken, refused


def test_recipes(tmp_path: Path):
    path = tmp_path / "recipe.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Recipe.from_file(path)
        assert Recipe.from_dict(found.to_dict()) == found

    Recipe.paper().to_file(path)
    taken, _ = try_all(3000, path.read_bytes(), read, (ValueError,))
    assert taken > 0


def test_recipes_of_any_values(tmp_path: Path):
    """JSON that is whole, with other values."""
    path = tmp_path / "recipe.json"
    odd = [None, True, -1, 0, 1, 2**31, 2**70, -(2**70), 1e400, float("nan"), "", "srft", [], {}, [[[]]], "\ud800"]
    for number in range(2000 * TIMES):
        rng = random.Random(SEED + number)
        data = Recipe(refined=1).with_bits(3, 8).to_dict()  # with every field
        for _ in range(rng.randint(1, 3)):
            where = rng.choice([data, *(data[name] for name in ("key", "value") if isinstance(data.get(name), dict))])
            where[rng.choice([*where, "another"])] = copy.deepcopy(rng.choice(odd))
        path.write_text(json.dumps(data))
        try:
            Recipe.from_file(path)
        except ValueError as refusal:
            assert "expected" in str(refusal) and "\n" not in str(refusal), f"KV4_FUZZ_SEED={SEED}, number {number}"


def test_calibrations(tmp_path: Path):
    path = tmp_path / "calibration.safetensors"
    recipe = Recipe()
    calibration.Calibration(
        tensors={f"layer.{n}.key.lambda": torch.rand(2, 4) + 0.5 for n in range(2)},
        recipe=recipe, model={"name": "tiny", "digest": "0"}, text="text", tokens=3,
    ).save(path)  # fmt: skip

    def read(data: bytes) -> None:
        path.write_bytes(data)
        calibration.load(path)

    taken, _ = try_all(1500, path.read_bytes(), read, (ValueError,))
    assert taken > 0


def test_sessions(tmp_path: Path):
    model = hf_cases.model_of("gemma3")
    cache = KV4Cache(model.config)
    model.set_attn_implementation("kv4")
    with torch.no_grad():
        model(input_ids=tokens_of(1, 150), past_key_values=cache)
    path = tmp_path / "session"
    cache.save(path)
    whole = path.read_bytes()
    size = struct.unpack_from("<Q", whole, 12)[0]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        KV4Cache.load(path, model.config)

    try_all(150, whole, read, (ValueError,))
    try_all(150, whole, read, (ValueError,), within=20 + size + 4 + 200)

    def with_header(text: bytes) -> None:
        front = whole[:12] + struct.pack("<Q", len(text)) + text
        read(front + struct.pack("<I", zlib.crc32(front)) + whole[20 + size + 4 :])

    # A head dim that no recipe is sealed at.
    with pytest.raises(ValueError, match=r"layers\[0\]: head_dim_k: expected .*; got 12"):
        with_header(whole[20 : 20 + size].replace(b'"dims": [2, 32, 32]', b'"dims": [2, 12, 32]', 1))
    # Headers that lie under right checksums.
    try_all(300, whole[20 : 20 + size], with_header, (ValueError,))


def test_gguf_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kv4.models import convert

    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    whole = path.read_bytes()
    folder = tmp_path / "folder"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        folder.mkdir(exist_ok=True)
        convert.convert(path, folder, "tiny.gguf")

    try_all(40, whole, read, (ModelError,), within=2600)
