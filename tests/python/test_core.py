"""The binding: tensors of several kinds, exceptions, and recipes."""

import dataclasses
import json
import os
import subprocess
import sys
import weakref

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
        (lambda c: c.append(rows(KV_HEADS, 5, 1), None), ValueError, "v: expected a tensor"),
        (lambda c: c.attend(rows(HEADS, 1, 1), None), ValueError, "out: expected a tensor"),
        (
            lambda c: c.append(rows(KV_HEADS, 5, 1), rows(KV_HEADS, 5, 1, np.float64)),
            ValueError,
            "v: expected dtype float32, float16 or bfloat16; got float64",
        ),
        (
            lambda c: c.attend(rows(HEADS, 1, 1), rows(HEADS, 1, 1), sinks=np.array([0, 0, np.nan, 0], np.float32)),
            ValueError,
            "sinks: expected numbers, or -infinity; got nan",
        ),
        (lambda c: make({"seal": "page"}), ValueError, "recipe: expected a kv4.Recipe; got {'seal'"),
        (lambda c: _core.Cache(None, kv_heads=1, head_dim_k=64, head_dim_v=64), ValueError, "recipe: expected a kv4.R"),
        (lambda c: Recipe(key=Side(mean="yes")), ValueError, "recipe.key.mean: expected True or False; got 'yes'"),
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
        (lambda c: kv4.set_operand_bits(12), ValueError, "bits: expected 8 or 16; got 12"),
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


def test_no_tokens_are_appended_whatever_their_strides():
    cache = make()
    cache.append(np.empty((1, KV_HEADS, 0, DIM), np.float32), np.empty((1, KV_HEADS, 0, DIM), np.float32))
    assert cache.length == 0


def test_meta_tensors_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.empty(1, KV_HEADS, 4, DIM, device="meta")
    with pytest.raises(ValueError, match="k: expected a tensor on the CPU; got device meta"):
        make().append(x, x)


class Frozen:
    """An immutable array of another library: only DLPack's read-only flag shows it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array.copy()
        self.array.flags.writeable = False

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options | {"max_version": (1, 0)})

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def mapped(array: np.ndarray, folder) -> np.ndarray:
    """A file's pages: writing to them ends the process."""
    array.tofile(folder / "array")
    return np.memmap(folder / "array", array.dtype, "r", shape=array.shape)


def locked(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


# DLPack has that flag from 1.0 on, numpy from 2.1 on.
EXPORTS_READ_ONLY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
READ_ONLY = {
    "flag": lambda x, folder: locked(x),
    "file": mapped,
    "bytes": lambda x, folder: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "broadcast": lambda x, folder: np.broadcast_to(x[:, :1, :1], x.shape),
    **({"dlpack": lambda x, folder: Frozen(x)} if EXPORTS_READ_ONLY else {}),
}


def writes() -> dict:
    """By argument: a call that writes to it, a good value of it, on a cache of 10 tokens."""
    q, o, m = rows(HEADS, 2, 3), np.zeros((1, HEADS, 2, DIM), np.float32), np.zeros((1, HEADS, 2), np.float32)
    return {
        "out of attend": (lambda c, x: c.attend(q, x), o),
        "o": (lambda c, x: c.attend_partial(q, x, m.copy(), m.copy(), upto=10), o),
        "m": (lambda c, x: c.attend_partial(q, o.copy(), x, m.copy(), upto=10), m),
        "l": (lambda c, x: c.attend_partial(q, o.copy(), m.copy(), x, upto=10), m),
        "out of dense_keys": (lambda c, x: c.dense_keys(3, 2, x), o[:, :KV_HEADS].copy()),
        "out of dense_values": (lambda c, x: c.dense_values(3, 2, x), o[:, :KV_HEADS].copy()),
    }


@pytest.fixture
def ten_tokens() -> _core.Cache:
    cache = make()
    cache.append(rows(KV_HEADS, 10, 1), rows(KV_HEADS, 10, 2))
    return cache


@pytest.mark.parametrize("kind", READ_ONLY)
@pytest.mark.parametrize("written", writes())
def test_what_is_written_can_be_written_to(written, kind, ten_tokens, tmp_path):
    call, good = writes()[written]
    frozen = READ_ONLY[kind](good, tmp_path)
    name = written.split()[0]
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor that can be written to; got a read-only <"):
        call(ten_tokens, frozen)
    assert not np.array(frozen.array if kind == "dlpack" else frozen).any()
    call(ten_tokens, good)
    assert good.any()


@pytest.mark.parametrize("written", writes())
def test_what_is_written_is_no_tensor_that_autograd_follows(written, ten_tokens):
    torch = pytest.importorskip("torch")
    call, good = writes()[written]
    name = written.split()[0]
    followed = torch.from_numpy(good).clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor that does not require grad.*got one that does"):
        call(ten_tokens, followed)
    assert not followed.detach().numpy().any()
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on the CPU; got device meta"):
        call(ten_tokens, torch.empty(good.shape, device="meta"))
    call(ten_tokens, followed.detach())
    assert followed.detach().numpy().any()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("written", writes())
def test_what_is_written_has_a_place_for_every_element(written, axis, ten_tokens):
    call, good = writes()[written]
    shape = [n if i != axis else 1 for i, n in enumerate(good.shape)]
    base = np.zeros(shape, np.float32)
    strides = [0 if i == axis else n for i, n in enumerate(base.strides)]
    shared = np.lib.stride_tricks.as_strided(base, good.shape, strides, writeable=True)
    name = written.split()[0]
    expected = "a place of its own for every element" if name == "out" else "a contiguous tensor"
    with pytest.raises(ValueError, match=rf"^{name}: expected {expected}; got"):
        call(ten_tokens, shared)
    assert not base.any()


def test_what_is_written_is_not_what_is_read(ten_tokens):
    q = rows(HEADS, 2, 3)
    before = q.copy()
    with pytest.raises(ValueError, match="^out: expected memory of its own; got memory that q shares"):
        ten_tokens.attend(q, q)
    o, m = np.zeros_like(q), np.zeros((1, HEADS, 2), np.float32)
    with pytest.raises(ValueError, match="^l: expected memory of its own; got memory that m shares"):
        ten_tokens.attend_partial(q, o, m, m, upto=10)
    np.testing.assert_array_equal(q, before)
    assert not o.any() and not m.any()


@pytest.mark.parametrize("kind", READ_ONLY)
def test_what_is_only_read_may_be_read_only(kind, tmp_path):
    folders = iter(range(100))

    def frozen(x):
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return READ_ONLY[kind](x, folder) if kind != "broadcast" else locked(x)

    k, v, q = rows(KV_HEADS, 10, 1), rows(KV_HEADS, 10, 2), rows(HEADS, 2, 3)
    scale = np.linspace(0.5, 2, KV_HEADS * DIM, dtype=np.float32).reshape(KV_HEADS, DIM)
    options = {
        "sinks": np.zeros(HEADS, np.float32),
        "start": np.zeros(1, np.int32),
        "window": np.full(1, 7, np.int32),
        "mask": np.ones((1, 1, 2, 10), np.float32),
    }
    given = Recipe(key=Side(lambda_="given"), value=Side(lambda_="given"))
    outs = [np.zeros_like(q) for _ in range(2)]
    for out, seen in zip(outs, (frozen, lambda x: x), strict=True):
        cache = make(given, lambda_k=seen(scale), lambda_v=seen(scale))
        cache.append(seen(k), seen(v))
        cache.attend(seen(q), out, **{name: seen(x) for name, x in options.items()})
    assert outs[0].any()
    np.testing.assert_array_equal(*outs)


def test_what_is_read_lives_until_the_call_ends(ten_tokens):
    class Fresh:
        """Exports a copy that lives as long as the export."""

        def __init__(self, array: np.ndarray, before=lambda: None) -> None:
            self.array, self.before, self.exported = array, before, lambda: None

        def __dlpack__(self, **options):
            self.before()
            copy = self.array.copy()
            self.exported = weakref.ref(copy)
            return copy.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    q = Fresh(rows(HEADS, 2, 3))
    alive = []
    start = Fresh(np.zeros(1, np.int32), lambda: alive.append(q.exported() is not None))
    out, want = np.zeros((1, HEADS, 2, DIM), np.float32), np.zeros((1, HEADS, 2, DIM), np.float32)
    ten_tokens.attend(q, out, start=start)
    assert alive and all(alive)
    assert q.exported() is None
    ten_tokens.attend(q.array, want)
    np.testing.assert_array_equal(out, want)


def test_memory_lent_to_a_callback_is_taken_back_when_it_raises(ten_tokens):
    kept = []

    def fails(view):
        kept.append(view)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ten_tokens.save(fails)
    with pytest.raises(OSError, match="disk full"):
        make().load(fails)
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            bytes(view)


def run_with(variables: dict[str, str], code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)


def test_an_instruction_set_of_the_environment_that_is_not_here_is_refused_by_use():
    code = """
import kv4
from kv4 import _core
print(repr(_core.isa()), _core.why_no_isa())
for recipe in (kv4.Recipe(), kv4.Recipe.exact()):
    try:
        _core.Cache(recipe, kv_heads=1, head_dim_k=64, head_dim_v=64)
    except NotImplementedError as error:
        print(error)
_core.force_isa("portable")
_core.Cache(recipe, kv_heads=1, head_dim_k=64, head_dim_v=64)
print(_core.isa(), repr(_core.why_no_isa()))
"""
    done = run_with({"KV4_CPU_ISA": "avx1024"}, code)
    text = f"KV4_CPU_ISA: expected one of {', '.join(_core.isas())} on this machine; got avx1024"
    assert done.stdout.splitlines() == [f"'' {text}", text, text, "portable ''"], done.stderr
    done = run_with({"KV4_CPU_OPERAND_BITS": "12"}, code)
    assert "KV4_CPU_OPERAND_BITS: expected 8 or 16; got 12" in done.stdout + done.stderr
    assert run_with({"KV4_CPU_ISA": ""}, "from kv4 import _core; print(_core.isa())").stdout.strip() == _core.isas()[0]


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
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a recipe in JSON"):
            Recipe.from_file(path)


@pytest.mark.parametrize("path", [None, 3, "", "."])
def test_files_are_named_by_paths(path):
    """A number would be the file descriptor of something else."""
    for call in (Recipe.from_file, Recipe().to_file):
        with pytest.raises(ValueError, match="path: expected the name of a file; got "):
            call(path)


@pytest.mark.parametrize("dim", ["64", None, 2.5, [64], np.zeros(2)])
def test_head_dims_of_a_recipe_are_whole_numbers(dim):
    for call in (Recipe().bits_per_value, Recipe(bits=4).at):
        with pytest.raises(ValueError, match="head_dim: expected a whole number; got "):
            call(dim)
        if dim is not None:
            with pytest.raises(ValueError, match="head_dim_v: expected a whole number; got "):
                call(64, dim)


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


def test_operands_of_8_bits_add_little_to_the_error_of_the_codes():
    k, v, q = rows(KV_HEADS, 500, 1), rows(KV_HEADS, 500, 2), rows(HEADS, 1, 3)
    cache = make()
    cache.append(k, v)
    cache.seal()
    out = {}
    for bits in (8, 16):
        kv4.set_operand_bits(bits)
        assert kv4.operand_bits() == bits
        out[bits] = np.empty((1, HEADS, 1, DIM), np.float32)
        cache.attend(q, out[bits])
    want = softmax_attention(q, k, v)
    of_codes, of_bytes = ((x - y) ** 2 for x, y in ((out[16], want), (out[8], out[16])))
    assert of_bytes.sum() <= 0.1 * of_codes.sum()
    assert _core.isa() != "avx512" or of_bytes.any()


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
