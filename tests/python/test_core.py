"""The binding: tensors of several kinds, exceptions, and recipes."""

import dataclasses
import json

import numpy as np
import pytest

import kv4
from kv4 import Recipe, Side, _core

HEADS, KV_HEADS, DIM = 4, 2, 64


def make(recipe: Recipe | None = None, **kwargs) -> _core.Cache:
    settings = dict(kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM) | kwargs
    return _core.Cache(recipe or Recipe(), **settings)


def rows(heads: int, tokens: int, seed: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, heads, tokens, DIM)).astype(dtype)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query over all keys, float64; [1, heads, 1, DIM]."""
    k, v = (np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=1) for x in (k, v))
    s = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) / np.sqrt(DIM)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def test_numpy_and_torch_give_the_same_answer():
    torch = pytest.importorskip("torch")
    k, v, q = rows(KV_HEADS, 200, 1), rows(KV_HEADS, 200, 2), rows(HEADS, 1, 3)
    out_numpy, out_torch = np.zeros((1, HEADS, 1, DIM), np.float32), torch.zeros(1, 1, HEADS, DIM)
    a, b = make(), make()
    a.append(k, v)
    a.attend(q, out_numpy)
    # Non-contiguous on purpose: prefill tensors are physically [batch, tokens, heads, channels].
    kt, vt = (torch.from_numpy(x.transpose(0, 2, 1, 3).copy()).transpose(1, 2) for x in (k, v))
    b.append(kt, vt)
    b.attend(torch.from_numpy(q), out_torch.transpose(1, 2))
    np.testing.assert_array_equal(out_numpy, out_torch.transpose(1, 2).numpy())
    # The sealed tokens are what dense_keys shows.
    a.seal()
    a.attend(q, out_numpy)
    dense_k, dense_v = np.empty_like(k), np.empty_like(v)
    a.dense_keys(0, 200, dense_k)
    a.dense_values(0, 200, dense_v)
    assert not np.array_equal(dense_k, k)
    want = softmax_attention(q, dense_k, dense_v)
    np.testing.assert_allclose(out_numpy, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    k, v, q = (
        torch.from_numpy(rows(h, t, s)).to(kind) for h, t, s in ((KV_HEADS, 50, 1), (KV_HEADS, 50, 2), (HEADS, 1, 3))
    )
    cache = make(Recipe.exact(), dtype=dtype)
    cache.append(k, v)
    out = torch.empty(1, HEADS, 1, DIM)
    cache.attend(q, out)
    want = softmax_attention(*(x.float().numpy() for x in (q, k, v)))
    np.testing.assert_allclose(out.numpy(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "begins"),
    [
        (lambda c: c.append(rows(3, 5, 1), rows(3, 5, 1)), ValueError, "k: expected shape"),
        (lambda c: c.append(rows(KV_HEADS, 5, 1, np.float64), rows(KV_HEADS, 5, 1)), ValueError, "k: expected dtype"),
        (lambda c: c.append(rows(KV_HEADS, 5, 1)[0], rows(KV_HEADS, 5, 1)), ValueError, "k: expected 4 axes"),
        (lambda c: c.append(rows(KV_HEADS, 5, 1)[..., ::2], rows(KV_HEADS, 5, 1)), ValueError, "k: expected"),
        (lambda c: c.append("keys", rows(KV_HEADS, 5, 1)), ValueError, "k: expected a tensor"),
        (lambda c: c.attend(rows(HEADS, 1, 1), rows(HEADS, 2, 1)), ValueError, "out: expected shape"),
        (
            lambda c: c.attend(rows(HEADS, 1, 1), rows(HEADS, 1, 1), start=np.zeros(2, np.int32)),
            ValueError,
            "start: expected",
        ),
        (
            lambda c: c.attend(rows(HEADS, 1, 1), rows(HEADS, 1, 1), mask=np.zeros((1, 3, 1, 9), bool)),
            ValueError,
            "mask: expected",
        ),
        (lambda c: c.crop(11), IndexError, "length: expected 0 to 10"),
        (lambda c: c.select([1]), IndexError, "rows: expected"),
        (lambda c: c.lambda_(1), IndexError, "row: expected"),
        (
            lambda c: _core.Cache(Recipe(), kv_heads=1, head_dim_k=20, head_dim_v=64),
            NotImplementedError,
            "head_dim_k: expected",
        ),
        (lambda c: _core.force_isa("mmx"), NotImplementedError, "isa: expected"),
        (lambda c: kv4.set_num_threads(0), ValueError, "num_threads: expected"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(call, kind, begins):
    cache = make()
    cache.append(rows(KV_HEADS, 10, 1), rows(KV_HEADS, 10, 2))
    before = (cache.length, cache.version, cache.nbytes())
    with pytest.raises(kind) as e:
        call(cache)
    assert str(e.value).startswith(begins) and "; got " in str(e.value)
    assert (cache.length, cache.version, cache.nbytes()) == before


def test_meta_tensors_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.empty(1, KV_HEADS, 4, DIM, device="meta")
    with pytest.raises(ValueError, match="k: expected a tensor on the CPU; got device meta"):
        make().append(x, x)


def test_recipe_presets_and_files(tmp_path):
    assert Recipe() == Recipe(key=Side(mean=True, lambda_="auto"), value=Side(), seal="page", sinks=4, window=64)
    assert Recipe.paper().seal == "arrival" and not Recipe.paper().key.mean
    assert Recipe.exact().seal == "never"
    for recipe in (
        Recipe(),
        Recipe.paper(),
        Recipe.exact(),
        Recipe(value=Side(rotation="householder", reflectors=7, group=32)),
    ):
        recipe.to_file(tmp_path / "r.json")
        assert Recipe.from_file(tmp_path / "r.json") == recipe


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        ({"format": "other"}, "recipe.format: expected 'kv4-recipe'"),
        ({"version": 2}, "recipe.version: expected 1"),
        ({"windw": 3}, "recipe.windw: expected one of"),
        ({"window": "64"}, "recipe.window: expected int"),
        ({"window": -1}, "recipe.window: expected"),
        ({"seal": "later"}, "recipe.seal: expected one of"),
        ({"key": {"rotation": "fft"}}, "recipe.key.rotation: expected one of"),
        ({"value": {"mean": True}}, "recipe.value.mean: expected"),
        ({"key": 5}, "recipe.key: expected an object"),
    ],
)
def test_recipe_files_are_checked(tmp_path, change, begins):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(Recipe().to_dict() | change))
    with pytest.raises(ValueError) as e:
        Recipe.from_file(path)
    assert str(e.value).startswith(begins)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a recipe in JSON"):
        Recipe.from_file(path)


def test_recipe_is_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().window = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="recipe.key: expected a kv4.Side"):
        Recipe(key=None)  # type: ignore[arg-type]


def test_threads_can_be_set():
    before = kv4.num_threads()
    kv4.set_num_threads(1)
    assert kv4.num_threads() == 1
    kv4.set_num_threads(before)


def test_what_a_device_has_is_named_on_the_cpu():
    assert "cpu" in _core.backends()
    assert _core.why_not("cpu") == ""
    assert _core.why_not("abacus") == "built without it"
    with pytest.raises(ValueError, match="backend: expected one of cpu"):
        make(backend="abacus")
    cache = make()
    cache.set_stream(0)
    with pytest.raises(RuntimeError, match="expected a cache that holds tokens"):
        cache.reserve(5)
    cache.append(rows(KV_HEADS, 5, 1), rows(KV_HEADS, 5, 2))
    cache.reserve(5)
    with pytest.raises(NotImplementedError, match="expected one whose steps can be captured; got cpu"):
        cache.advance()
    mask, out = np.ones((1, 1, 1, 5), bool), np.zeros((1, HEADS, 1, DIM), np.float32)
    with pytest.raises(ValueError, match=r"host_mask: expected the shape and dtype of mask"):
        cache.attend(rows(HEADS, 1, 3), out, mask=mask, host_mask=mask[..., :4])
    cache.attend(rows(HEADS, 1, 3), out, mask=mask, host_mask=mask)


@pytest.mark.skipif("cuda" not in _core.backends(), reason=f"no CUDA backend: {_core.why_not('cuda')}")
def test_cuda_tensors():
    torch = pytest.importorskip("torch")
    cache = make(dtype="float16", backend="cuda:0")
    cache.set_stream(torch.cuda.current_stream().cuda_stream)
    k, v, q = (torch.from_numpy(rows(h, t, s)) for h, t, s in ((KV_HEADS, 200, 1), (KV_HEADS, 200, 2), (HEADS, 1, 3)))
    with pytest.raises(ValueError, match=r"k: expected a tensor on cuda:0; got device cpu"):
        cache.append(k.half(), v.half())
    k, v = (x.half().transpose(1, 2).contiguous().transpose(1, 2).cuda() for x in (k, v))
    cache.append(k, v)
    out = torch.zeros(1, HEADS, 1, DIM, device="cuda")
    with pytest.raises(ValueError, match=r"q: expected a tensor on cuda:0; got device cpu"):
        cache.attend(q, out)
    cache.attend(q.cuda(), out)
    want = softmax_attention(q.numpy(), k.float().cpu().numpy(), v.float().cpu().numpy())
    np.testing.assert_allclose(out.cpu().numpy(), want, atol=1e-3 * np.abs(want).max())
    cache.seal()
    assert cache.sealed_tokens(0) == 128
    assert len(cache.lambda_(0)) == KV_HEADS * DIM
    start = torch.tensor([3], dtype=torch.int32)
    cache.attend(q.cuda(), out, start=start)
    with pytest.raises(ValueError, match=r"start: expected a tensor on the CPU; got device cuda:0"):
        cache.attend(q.cuda(), out, start=start.cuda())
