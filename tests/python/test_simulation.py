"""Simulation (fake quantisation) against the packed cache, and against itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tiny_model
from kv4 import Recipe, Side, _core
from kv4.bench.text import python_reference
from kv4.calibration import identity_of, load
from kv4.evaluate import Candidate, measure_all
from kv4.evaluate.calibrate import Layer, calibrate, capture, errors
from kv4.evaluate.calibration import lambda_from_energies, score_transform
from kv4.evaluate.fake import fp16, seal
from kv4.evaluate.learn import learn, squared_error
from kv4.evaluate.levels import levels
from kv4.evaluate.peers import measure_hf, measure_llama
from kv4.evaluate.quality import exact_outputs
from kv4.evaluate.rotations import rotation
from kv4.evaluate.rows import all_rows, select
from kv4.evaluate.simulation import _attend, _Session, page_runs, seal_layer
from kv4.evaluate.state import State
from kv4.evaluate.variant import SideVariant, Variant, from_recipe
from kv4.evaluate.windows import cut

SIDES = [
    Side(mean=True, lambda_="auto"),
    Side(mean=True),
    Side(rotation="srht", levels="uniform", scale="abs_max"),
    Side(rotation="householder", reflectors=5, seed=9, mean=True, lambda_="auto"),
    Side(rotation="identity", group=32, scale="abs_max", mean=True),
    Side(levels="uniform", group=64, lambda_="auto"),
]


def _rows(d: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of 2 KV heads with 2 query heads each; keys with a bias far larger than their spread."""
    random = torch.Generator().manual_seed(d)
    q = torch.randn(4, tokens, d, generator=random) * torch.linspace(0.2, 3, d)
    k = torch.randn(2, tokens, d, generator=random) * torch.linspace(2, 0.1, d) + 40 * torch.randn(d, generator=random)
    return q, k, torch.randn(2, tokens, d, generator=random)


@pytest.mark.parametrize("side", SIDES, ids=[f"{s.rotation}-{s.levels}-{s.scale}-{s.group}" for s in SIDES])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_what_the_packed_cache_reads_back(side: Side, d: int) -> None:
    if side.group and d % side.group:
        pytest.skip(f"groups of {side.group} do not divide {d}")
    value = dataclasses.replace(side, mean=False, lambda_="none")
    recipe = Recipe(key=side, value=value)
    tokens = 4 + 3 * 64 + 64  # three pages are due
    q, k, v = _rows(d, tokens)
    core = _core.Cache(recipe, kv_heads=2, head_dim_k=d, head_dim_v=d)
    for lo in range(0, tokens, 52):
        part = slice(lo, lo + 52)
        core.append(k[None, :, part].contiguous(), v[None, :, part].contiguous())
        queries = q[None, :, part].contiguous()
        core.attend(queries, torch.empty_like(queries))
    core.seal()
    assert core.page_count(0) == 3
    variant = from_recipe(recipe)
    sealed = seal_layer(_Session(variant, None, None), 0, q.double(), k.double(), v.double())
    for which, mine, read in zip("kv", sealed, (core.dense_keys, core.dense_values), strict=True):
        packed = torch.empty(1, 2, 192, d)
        read(4, 192, packed)
        mine, own = mine[:, :192], (k if which == "k" else v)[:, 4:196]
        # A code on the other side of a tie moves a vector by a level; nothing else may differ by more than
        # an fp16 ulp of its scale and mean.
        apart = (mine - packed[0]).norm(dim=-1) / (own - own.mean(1, keepdim=True)).norm(dim=-1)
        assert (apart < 2e-3).float().mean() > 0.98
        assert apart.max() < 0.25


def test_codes_scales_and_mean_are_the_cache_s() -> None:
    d = 128
    recipe = Recipe(key=Side(mean=True), sinks=0, window=0)
    _, k, v = _rows(d, 128)
    core = _core.Cache(recipe, kv_heads=2, head_dim_k=d, head_dim_v=d)
    core.append(k[None], v[None])
    core.attend(torch.ones(1, 4, 128, d), torch.empty(1, 4, 128, d))
    core.seal()
    matrix = torch.from_numpy(rotation("srft", d, Side.seed))
    for index, (rows, side) in enumerate(((k, SideVariant(mean="page")), (v, SideVariant()))):
        mine = seal(rows[:, :64].double(), side, matrix, matrix.mT)
        for head in range(2):
            packed = np.frombuffer(core.page_codes(0, 0, head)[index], dtype=np.uint8).reshape(64, d // 2)
            codes = torch.from_numpy(np.stack([packed & 15, packed >> 4], -1).reshape(64, d).astype(np.int16)) - 8
            assert (codes != mine.codes[head]).float().mean() < 2e-3  # ties, decided in another precision


@pytest.mark.parametrize("kind", ["srft", "srht", "householder", "haar"])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_rotations_are_orthonormal(kind: str, d: int) -> None:
    matrix = rotation(kind, d, 3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-12)


def test_levels() -> None:
    # Max 1960, tables I and II: mean squared errors of the optimal quantisers of a unit Gaussian.
    from kv4.evaluate.levels import _distortion

    for bits, published in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        table = levels("lloyd_max", bits)
        assert _distortion(np.array(table.magnitude), table.gain) == pytest.approx(published, rel=3e-3)
    # His 32 levels; 64 and 256 have no row there, and a bit more can take no more than its 6 dB.
    for bits, most in ((5, 1.02 * 0.002499), (6, 0.0025 / 3.5), (8, 0.0025 / 20)):
        table = levels("lloyd_max", bits)
        assert most / 2 < _distortion(np.array(table.magnitude), table.gain) < most
        assert all(m == int(m) and 0 <= m <= 127 for m in table.magnitude)
        assert len(set(table.magnitude)) == 2 ** (bits - 1)
    assert 1 / levels("uniform", 4).gain == pytest.approx(0.35341, rel=1e-4)
    uniform, cubic, best = (
        _distortion(np.array(levels(kind, 4).magnitude), levels(kind, 4).gain)
        for kind in ("uniform", "cubic", "lloyd_max")
    )
    assert best < cubic < uniform
    with pytest.raises(ValueError, match="^bits: expected 2 to 8; got 9"):
        levels("uniform", 9)


@pytest.mark.parametrize(("tokens", "body", "window", "page"), [(700, 4, 64, 64), (300, 0, 0, 16), (900, 16, 256, 128)])
def test_a_query_sees_the_pages_that_were_due_before_its_token(tokens: int, body: int, window: int, page: int) -> None:
    end = 0
    for lo, hi, sealed in page_runs(tokens, body, window, page):
        assert lo == end and hi > lo
        end = hi
        for t in (lo, hi - 1):
            pages = max(0, (t - body - window) // page)
            assert sealed == (body + pages * page if pages else 0)
    assert end == tokens


def test_fp16_saturates() -> None:
    torch.testing.assert_close(fp16(torch.tensor([1e6, -1e6, 1.0001])), torch.tensor([65504.0, -65504.0, 1.0]))


def test_more_bits_smaller_groups_and_moments_help() -> None:
    q, k, v = _rows(128, 1024)
    layers = [Layer(q, k, v)]
    base = Variant()
    by_bits = [errors(layers, base.replace(both__bits=bits)) for bits in (2, 3, 4, 8)]
    for less, more in pairwise(by_bits):
        assert more.key < less.key and more.value < less.value and more.score < less.score
    assert errors(layers, base.replace(both__bits=16)).key == 0
    assert errors(layers, base.replace(both__group=32)).value < errors(layers, base).value
    plain, auto = errors(layers, base.replace(key__lambda_="none")), errors(layers, base)
    assert auto.score < plain.score / 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    return *tiny_model.load(folder), folder


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe.paper(), Recipe(sinks=0, window=128)], ids=["kv4", "paper", "w128"]
)
def test_simulated_quality_is_the_packed_cache_s(tiny: tuple, recipe: Recipe) -> None:
    """Layers that slide, and one that does not; the kernels' rounding of q and p is all that may differ."""
    model, tokenizer, _ = tiny
    both = [Candidate("packed", recipe), Candidate("simulated", from_recipe(recipe))]
    found = measure_all(model, cut(tokenizer, python_reference(), 1, 700), both)
    packed, simulated = found["packed"], found["simulated"]
    assert packed.kl > 1e-6
    assert simulated.kl == pytest.approx(packed.kl, rel=0.01)
    np.testing.assert_allclose(simulated.scores[0].kl, packed.scores[0].kl, rtol=0.2, atol=0.05 * packed.kl)
    assert simulated.dppl == pytest.approx(packed.dppl, abs=1e-4)


def test_lambda_is_the_core_s() -> None:
    q, k, v = _rows(64, 200)
    core = _core.Cache(Recipe(), kv_heads=2, head_dim_k=64, head_dim_v=64)
    for t in range(200):
        core.append(k[None, :, t : t + 1].contiguous(), v[None, :, t : t + 1].contiguous())
        core.attend(q[None, :, t : t + 1].contiguous(), torch.empty(1, 4, 1, 64))
    energy_q = q[:, 7:132:8].double().square().reshape(2, -1, 64).sum(1)
    blocks = k[:, 4:132].double().split(64, 1)
    energy_k = sum((b - b.mean(1, keepdim=True)).square().sum(1) for b in blocks)
    expected = lambda_from_energies(energy_q, energy_k, 0.2) ** 0.9
    torch.testing.assert_close(torch.tensor(core.lambda_(0)).view(2, 64).double(), expected, rtol=1e-4, atol=0)


def test_the_transform_minimises_the_error_of_scores() -> None:
    random = torch.Generator().manual_seed(5)
    a, b = (torch.randn(1, 32, 200, generator=random, dtype=torch.float64) for _ in "ab")
    key, query = (x * torch.rand(32, 1, generator=random, dtype=torch.float64) @ x.mT for x in (a, b))
    key, query = (key + key.mT) / 2, (query + query.mT) / 2
    key, query = key + 300 * torch.eye(32), query + 300 * torch.eye(32)

    def cost(t: torch.Tensor) -> float:
        inverse = torch.linalg.inv(t)
        return float(torch.trace(t @ key[0] @ t.T) * torch.trace(inverse.T @ query[0] @ inverse))

    best = score_transform(key, query, torch.eye(32, dtype=torch.float64))[0]
    diagonal = torch.diag(lambda_from_energies(query.diagonal(dim1=1, dim2=2), key.diagonal(dim1=1, dim2=2))[0])
    assert cost(best) < cost(diagonal) <= cost(torch.eye(32, dtype=torch.float64))
    for _ in range(20):
        step = torch.randn(32, 32, generator=random, dtype=torch.float64) * 0.01
        assert cost(best @ (torch.eye(32) + step)) >= cost(best) * (1 - 1e-9)


def test_a_calibration_comes_back_and_says_what_does_not_fit(tiny: tuple, tmp_path: Path) -> None:
    model, tokenizer, folder = tiny
    windows = cut(tokenizer, python_reference(), 2, 512)
    made = calibrate(model, windows, identity=identity_of(folder), text="a text")
    file = tmp_path / "c.safetensors"
    made.save(file)
    back = load(file, folder)
    assert back.recipe == made.recipe and back.recipe.key.lambda_ == "given"
    assert (back.text, back.tokens, back.method) == ("a text", 1024, "lambda")
    assert back.versions["kv4"]
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(back.tensors[name], tensor)
    layer = capture(model, windows[0])[1]
    assert back.lambda_of("key", 1).shape == (2, layer.key.shape[-1])

    import kv4.hf

    kv4.hf.attach(model, **back.arguments())
    try:
        out = model.generate(windows[0][:, :200], max_new_tokens=4, do_sample=False)
        assert out.shape[1] == 204
    finally:
        kv4.hf.detach(model)
    auto = measure_all(model, windows, [Candidate("auto", Recipe()), Candidate("given", back.recipe, back)])
    assert 0 < auto["given"].kl < 3 * auto["auto"].kl

    other = json.loads((folder / "config.json").read_text())
    other["rope_theta"] = 123.0
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"^calibration: expected one of this model \(other, .*\); got one of "):
        load(file, elsewhere)
    with pytest.raises(FileNotFoundError, match="^calibration: expected a file; got"):
        load(tmp_path / "none")
    (tmp_path / "bad").write_text("no tensors")
    with pytest.raises(ValueError, match="^calibration: expected a safetensors file; got"):
        load(tmp_path / "bad")
    made.tensors["layer.0.key.lambda"][0, 0] = -1
    made.save(tmp_path / "negative")
    with pytest.raises(ValueError, match="expected positive lambda; got -1"):
        load(tmp_path / "negative")


def test_a_transform_runs_packed_and_simulated_alike(tiny: tuple) -> None:
    model, tokenizer, _ = tiny
    windows = cut(tokenizer, python_reference(), 1, 600)
    made = calibrate(model, windows, method="transform")
    variant = Variant().replace(key__rotation="given", key__lambda_="none")
    both = [Candidate("packed", made.recipe, made), Candidate("simulated", variant, made)]
    found = measure_all(model, windows, both)
    assert found["packed"].kl > 1e-5
    assert found["simulated"].kl == pytest.approx(found["packed"].kl, rel=0.02)


@pytest.mark.parametrize("after_srft", [False, True])
def test_learning_lowers_the_error_it_is_trained_on(after_srft: bool) -> None:
    q, k, v = _rows(64, 600)
    k = k * torch.linspace(0.1, 4, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    made = learn([Layer(q, k, v)], after_srft=after_srft, steps=40)
    matrix = made.matrix_of("key", 0)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(64), atol=1e-4, rtol=0)
    centred = torch.cat([block - block.mean(1, keepdim=True) for block in k[:, 4:].split(64, 1)], 1)
    start = torch.from_numpy(rotation("srft", 64, Side.seed)).float() if after_srft else torch.eye(64)
    before = squared_error(centred, start, torch.zeros(2, 64))
    after = squared_error(centred, matrix, made.lambda_of("key", 0).log())
    assert after < before


def test_rows_run_and_have_names_of_their_own() -> None:
    rows = all_rows(64)
    assert len({row.name for row in rows}) == len(rows)
    q, k, v = _rows(64, 260)
    layers = [Layer(q, k, v)]
    for row in rows:
        if row.needs:
            continue
        found = errors(layers, row.variant)
        # Without its mean the bias of these keys drowns their differences.
        limit = 0.2 if row.variant.key.mean == "page" else 100
        assert 0 <= found.key < limit and 0 <= found.value < 0.2, row.name
        assert 2 < row.variant.bits_per_value(64, 64) < 17
    assert [row.name for row in select("sinks,kv4", 64)] == ["kv4", "sinks-0", "sinks-1", "sinks-16"]
    with pytest.raises(ValueError, match="^--rows: expected all, groups .*; got 'nothing'"):
        select("nothing", 64)


def test_bits_per_value() -> None:
    assert Variant().bits_per_value(128, 128) == 4.25
    assert Variant().replace(both__bits=3, both__group=32).bits_per_value(128, 128) == 3.5 + 0.125


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_transformers_own_quantised_cache(backend: str) -> None:
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(300, (1, 400), generator=torch.Generator().manual_seed(1))
    state = State(None)
    options = {"backend": backend, "identity": {"digest": "tiny"}}

    def exact(ids: torch.Tensor) -> torch.Tensor:
        return exact_outputs(model, ids, None, None)

    found = measure_hf(model, [ids], exact, state, **options)
    assert len(found[0].kl) == 199 and found[0].kl.mean() > 1e-7
    again = measure_hf(model, [ids], lambda _: pytest.fail("computed what was known"), state, **options)
    assert (again[0].kl == found[0].kl).all()


class _Llama:
    """Logits that depend on the tokens, and a little on the cache's type."""

    def __init__(self, *, n_ctx: int, type_k: int, type_v: int, logits_all: bool, **options: object) -> None:
        assert type_k == type_v and logits_all and options["flash_attn"]
        self.scores = np.zeros((n_ctx, 50), dtype=np.float32)
        self.noise, self.n_tokens = 0.1 * type_k, 0

    def eval(self, tokens: list[int]) -> None:
        for token in tokens:
            row = np.random.default_rng(token).standard_normal(50) * 3
            row += self.noise * np.random.default_rng(self.n_tokens).standard_normal(50)
            self.scores[self.n_tokens] = row
            self.n_tokens += 1

    def close(self) -> None:
        pass


def test_llama_cpp_s_caches_against_its_own_f16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Llama=_Llama, GGML_TYPE_F16=0, GGML_TYPE_Q8_0=1, GGML_TYPE_Q4_0=2)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    windows = [torch.arange(600)[None] % 50, torch.arange(7, 607)[None] % 50]
    done: list[int] = []
    state = State(tmp_path / "state")
    found = measure_llama(gguf, windows, state, progress=done.append)
    assert len(found["q8_0"]) == 2 and len(found["q8_0"][0].kl) == 299
    for q8, q4 in zip(found["q8_0"], found["q4_0"], strict=True):
        assert 0 < q8.kl.mean() < q4.kl.mean()
    assert sum(done) == 3 * 2 * 600
    monkeypatch.setattr(module, "Llama", None)
    assert (measure_llama(gguf, windows, State(tmp_path / "state"))["q4_0"][1].kl == found["q4_0"][1].kl).all()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"kv4\[llama\]"):
        measure_llama(gguf, windows, state)


def test_a_token_s_own_step_may_see_it_exact() -> None:
    random = torch.Generator().manual_seed(2)
    q, k, v, rounded_k, rounded_v = (torch.randn(1, 2, 300, 32, generator=random) for _ in "qkvab")
    runs = [(0, 256, 0), (256, 300, 0)]
    for window in (None, 100):
        options = (None, None, None, window)
        out = _attend(None, q, rounded_k, rounded_v, runs, lambda n: None, options, (k, v))[0]
        for t in (0, 1, 99, 100, 255, 256, 299):
            past = slice(max(0, t + 1 - window) if window else 0, t)
            keys = torch.cat([rounded_k[0, :, past], k[0, :, t : t + 1]], 1)
            values = torch.cat([rounded_v[0, :, past], v[0, :, t : t + 1]], 1)
            weights = torch.softmax(torch.einsum("hd,hkd->hk", q[0, :, t], keys) * 32**-0.5, -1)
            torch.testing.assert_close(out[t], torch.einsum("hk,hkd->hd", weights, values), atol=1e-5, rtol=1e-4)
