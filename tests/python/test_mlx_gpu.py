"""kv4.mlx on MLX's GPU against the C++ core: the text that MLX compiles, run in emulation, or on MLX's own GPU where it
has Metal. So far nothing here ran on an Apple GPU."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="kv4.mlx needs mlx and mlx-lm (pip install kv4[mlx])", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="kv4.mlx needs mlx-lm (pip install kv4[mlx])", exc_type=ImportError)

from mlx_lm.models import cache as stock  # noqa: E402

import kv4.mlx  # noqa: E402
from kv4 import Recipe, Side, _core  # noqa: E402
from kv4.metal import host as metal_host  # noqa: E402
from kv4.metal import source  # noqa: E402
from kv4.mlx import BatchKV4Cache, KV4Cache, core, gpu  # noqa: E402
from mlx_cases import greedy, greedy_batch, model_of, prompt_of  # noqa: E402
from mlx_device import NAME, EmulatedKernel, as_numpy, compiler, host, needs_gpu, written  # noqa: E402

HEADS, GROUP = 2, 2
TOLERANCE = 2e-3  # of attention, against the largest output


class Pair:
    """A cache on the emulated GPU and the C++ core, fed alike."""

    def __init__(self, recipe: Recipe, dim: int = 64, batch: int = 1, dtype=mx.float32, mode="fast", **options):
        arguments = {"dtype": str(dtype).split(".")[-1], "kv_heads": HEADS, "head_dim_k": dim, "head_dim_v": dim}
        self.caches = [
            gpu.GpuCore(host(dim, mode), recipe, **arguments, **options),
            core.HostCore(_core.Cache(recipe, **arguments, **options), (HEADS, dim, dim)),
        ]
        self.batch, self.dim, self.dtype, self.seed = batch, dim, dtype, 0

    def normal(self, heads: int, tokens: int):
        # [batch, T, heads, d] in memory, as a model's projections leave it.
        self.seed += 1
        x = mx.random.normal((self.batch, tokens, heads, self.dim), key=mx.random.key(self.seed))
        scale = mx.array(np.logspace(-0.5, 0.5, self.dim).astype(np.float32))
        return (x * scale + 2 * scale[::-1]).transpose(0, 2, 1, 3).astype(self.dtype)

    def step(self, tokens: int, **options) -> None:
        k, v, q = self.normal(HEADS, tokens), self.normal(HEADS, tokens), self.normal(HEADS * GROUP, tokens)
        out = []
        for cache in self.caches:
            cache.append(k, v)
            out.append(cache.attend(q, **options))
        assert out[0].dtype == self.dtype and out[0].shape == out[1].shape
        a, b = (x.astype(mx.float32) for x in out)
        rounding = {mx.float32: 0, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[self.dtype]
        assert float(mx.abs(a - b).max()) <= (TOLERANCE + rounding) * float(mx.abs(b).max())
        self.compare()

    def both(self, name: str, *arguments) -> None:
        for cache in self.caches:
            getattr(cache, name)(*arguments)
        self.batch = self.caches[1].batch or self.batch
        self.compare()

    def compare(self) -> None:
        ours, theirs = self.caches
        assert (ours.length, ours.batch, ours.first) == (theirs.length, theirs.batch, theirs.first)
        for b in range(theirs.batch):
            assert ours.sealed_tokens(b) == theirs.sealed_tokens(b)
            assert ours.exact_tokens(b) == theirs.exact_tokens(b)
            assert np.allclose(ours.lambda_(b), theirs.lambda_(b), rtol=1e-5)
            for page in range(theirs.page_count(b)):
                for head in range(HEADS):
                    for x, y in zip(ours.page_codes(b, page, head), theirs.page_codes(b, page, head), strict=True):
                        # Both meet the definition's rule; a value on a decision boundary may go either way.
                        assert (np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)).mean() <= 1e-3


@needs_gpu
@pytest.mark.parametrize(
    ("recipe", "dim", "dtype"),
    [
        (Recipe(), 64, mx.float32),
        (Recipe(), 128, mx.float16),
        (Recipe(), 80, mx.bfloat16),
        (Recipe(), 256, mx.bfloat16),
        (Recipe.exact(), 96, mx.float16),
        (Recipe(window=0, sinks=0), 64, mx.float32),
        (Recipe.paper(), 64, mx.float32),
        (Recipe.paper(), 128, mx.float16),
        (
            Recipe(key=Side(rotation="srht", levels="uniform", scale="abs_max"), value=Side(rotation="householder")),
            64,
            mx.float32,
        ),
    ],
    ids=str,
)
def test_policy_codes_and_attention_are_the_cores(recipe, dim, dtype):
    pair = Pair(recipe, dim, dtype=dtype)
    for tokens in (100, 1, 40, 64, 1, 130, 1):
        pair.step(tokens)


def saved(cache) -> bytes:
    file = io.BytesIO()
    cache.save(file.write)
    return file.getvalue()


@needs_gpu
@pytest.mark.parametrize(
    ("recipe", "dim", "dtype"),
    [
        (Recipe(), 64, mx.float32),
        (Recipe(), 80, mx.bfloat16),
        (Recipe.exact(), 96, mx.float16),
        (Recipe.paper(), 64, mx.float32),
    ],
    ids=str,
)
def test_a_file_of_either_is_read_by_the_other(recipe, dim, dtype):
    pair = Pair(recipe, dim, batch=2, dtype=dtype)
    for tokens in (130, 1):
        pair.step(tokens)
    files = [saved(cache) for cache in pair.caches]
    twin = Pair(recipe, dim, batch=2, dtype=dtype)
    for cache, file in zip(twin.caches, reversed(files), strict=True):
        cache.load(io.BytesIO(file).readinto)
        assert saved(cache) == file
    twin.seed = pair.seed
    for tokens in (70, 1):
        twin.step(tokens)
    twin.both("crop", 150)
    twin.step(1)


@needs_gpu
def test_windows_crops_forks_and_batches():
    pair = Pair(Recipe(), batch=2, sliding_window=150)
    for tokens in (90, 64, 200, 1):
        pair.step(tokens)
    assert pair.caches[1].first > 0
    pair = Pair(Recipe(), batch=2)
    pair.step(300)
    pair.step(1)
    pair.both("crop", 210)
    pair.step(5)
    pair.both("select", [1, 0, 1])
    twins = [cache.clone() for cache in pair.caches]
    pair.step(70)
    pair.caches = twins
    pair.compare()
    pair.step(3)
    pair.both("reset")
    pair.step(5)
    # Forks fill copies of a page that was filled in part on arrival.
    pair = Pair(Recipe.paper(), batch=2)
    pair.step(100)
    twins = [cache.clone() for cache in pair.caches]
    pair.step(40)
    pair.caches = twins
    pair.compare()
    pair.both("crop", 50)
    pair.both("select", [1, 0, 1])
    pair.step(3)
    # Forks before the first page is due: each goes on with the energies of its own queries.
    pair = Pair(Recipe())
    pair.step(40)
    twins = [cache.clone() for cache in pair.caches]
    pair.step(60)
    pair.caches = twins
    pair.step(100)
    pair.step(1)
    assert pair.caches[0].page_count(0) == 1


@needs_gpu
def test_given_lambda_and_a_dense_rotation():
    random = np.random.default_rng(1)
    matrix = np.linalg.qr(random.standard_normal((64, 64)))[0].astype(np.float32)
    scale = random.uniform(0.5, 1.5, (HEADS, 64)).astype(np.float32)
    recipe = Recipe(key=Side(rotation="dense", mean=True, lambda_="given"), value=Side(lambda_="given"))
    pair = Pair(recipe, lambda_k=scale, lambda_v=scale[::-1].copy(), matrix_k=matrix)
    for tokens in (200, 1):
        pair.step(tokens)
    # Values alone have a lambda.
    pair = Pair(Recipe(key=Side(mean=True, lambda_="none"), value=Side(lambda_="given")), lambda_v=scale)
    for tokens in (200, 1):
        pair.step(tokens)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", ["bool", "additive", "few columns", "softcap", "sinks", "all"])
def test_masks(kind, tokens):
    pair = Pair(Recipe(), batch=2)
    if kind != "few columns":
        pair.step(200)
    length = pair.caches[1].length + tokens
    shape = (2, 1, tokens, max(1, length - 10)) if kind == "bool" else (1, HEADS * GROUP, tokens, length)
    options: dict = {"scale": 0.2}
    if kind == "bool":
        mask = mx.random.uniform(shape=shape, key=mx.random.key(3)) > 0.4
        mask[..., -1] = True
        options |= {"mask": mask, "offset": length - shape[3], "causal": False}
    elif kind in ("additive", "few columns"):
        mask = mx.random.normal(shape if kind == "additive" else (1, 1, 1, length), key=mx.random.key(4))
        options |= {"mask": mx.where(mask > 1.5, -mx.inf, mask), "causal": False}
    elif kind == "softcap":
        options |= {"softcap": 3.0}
    elif kind == "sinks":
        options |= {"sinks": mx.array([0.0, 2.0, -3.0, 5.0])}  # fewer than 8 elements
    else:
        options |= {"causal": False}
    pair.step(tokens, **options)


def partial_of(cache, q, upto, scale):
    if isinstance(cache, gpu.GpuCore):
        return cache.partial(q, upto, scale)
    o, m, weight = np.empty(q.shape, np.float32), np.empty(q.shape[:3], np.float32), np.empty(q.shape[:3], np.float32)
    cache.attend_partial(q, o, m, weight, upto=upto, scale=scale)
    return gpu.State(*map(mx.array, (o, m, weight)))


@needs_gpu
def test_partial_states_and_dense_rows():
    pair = Pair(Recipe())
    pair.step(250)
    pair.step(1)
    k, v, q = pair.normal(HEADS, 70), pair.normal(HEADS, 70), pair.normal(HEADS * GROUP, 70)
    outputs, sums = [], []
    for cache in pair.caches:
        cache.append(k, v)
        state = partial_of(cache, q, 251, 0.1)
        outputs.append(state.o / state.l[..., None])
        sums.append(state.m + mx.log(state.l))
    assert float(mx.abs(outputs[0] - outputs[1]).max()) <= TOLERANCE * float(mx.abs(outputs[1]).max())
    assert mx.allclose(*sums, atol=TOLERANCE * 5)
    for values in (False, True):
        ours, theirs = (cache.dense(values, 40, 230) for cache in pair.caches)
        assert float(mx.abs(ours - theirs).max()) <= 1e-3 * float(mx.abs(theirs).max())


@pytest.mark.slow  # a minute of compiling; the same kernels under kv4.metal's tables are checked by every run
@needs_gpu
def test_every_launch_passes_the_emulators_checker():
    """Races, bounds, uninitialised reads, alignment: the tables, padded inputs and fresh outputs of this host."""
    for recipe in (Recipe(), Recipe.paper()):
        pair = Pair(recipe, batch=2, mode="check", dtype=mx.bfloat16)
        for tokens in (140, 1, 3):
            pair.step(tokens)
        pair.both("crop", 80)
        pair.step(1)


@pytest.mark.skipif(compiler() is None, reason="needs the Metal emulator")
def test_the_emulators_own_text_is_mlxs():
    """emulator/mlx.py writes signatures where MLX is not installed."""
    found: list = []
    bodies: dict = {}

    def metal_kernel(**arguments):
        bodies[arguments["name"]] = arguments
        return EmulatedKernel("fast", found, **arguments)

    cache = gpu.GpuCore(
        gpu.MlxHost(64, metal_kernel), Recipe(), dtype="bfloat16", kv_heads=1, head_dim_k=64, head_dim_v=64
    )
    for tokens in (200, 1):
        x = mx.random.normal((1, 1, tokens, 64)).astype(mx.bfloat16)
        cache.append(x, x)
        cache.attend(x)
    cache.dense(False, 0, 100)
    assert {source.entries()[name].name for name in bodies} == set(source.entries())
    for text, inputs, template, output_dtypes in found:
        name = NAME.search(text).group(1)
        body = next(x for entry, x in bodies.items() if name.startswith(f"custom_kernel_{entry}_"))
        labels = [*body["input_names"], *body["output_names"]]
        dtypes = [x.dtype for x in inputs] + output_dtypes
        arrays = [(n, np.zeros(8, np.uint16 if d == mx.bfloat16 else as_numpy(mx.zeros(1, d)).dtype))
                  for n, d in zip(labels, dtypes, strict=True)]  # fmt: skip
        types = {n: "bfloat16_t" for n, d in zip(labels, dtypes, strict=True) if d == mx.bfloat16}
        split = len(inputs)
        own = written.kernel_text(name, arrays[:split], arrays[split:], body["source"], body["header"], template, types)
        assert own == text


# Models of mlx-lm on an emulated GPU.


def compute_on(monkeypatch, gpu: bool) -> None:
    """Whether MLX says that it computes on a GPU."""
    monkeypatch.setattr(core, "on_gpu", lambda: gpu)


@pytest.fixture
def emulated(monkeypatch):
    """MLX computes on its CPU; kv4's caches take it for a GPU. The list of heads whose kernels were asked for."""
    asked = []

    def gpu_host(head_dim):
        asked.append(head_dim)
        return host(head_dim)

    compute_on(monkeypatch, gpu=True)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "gpu_host", gpu_host)
    return asked


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_generate_gives_the_tokens_of_the_cpu(name, emulated, monkeypatch):
    model = model_of(name, head_dim=64)
    prompt = prompt_of(150)
    ours = [greedy(model, prompt, 8, kv4.mlx.make_prompt_cache(model), step) for step in (64, 2048)]
    assert emulated and set(emulated) == {64}
    compute_on(monkeypatch, gpu=False)
    assert ours == [greedy(model, prompt, 8, kv4.mlx.make_prompt_cache(model), step) for step in (64, 2048)]


@needs_gpu
def test_ragged_batches_give_the_tokens_of_the_cpu(emulated, monkeypatch):
    model = kv4.mlx.attach(model_of("llama", head_dim=64))
    try:
        prompts = [prompt_of(n, seed=n) for n in (30, 140, 75)]
        ours = greedy_batch(model, prompts, [4, 6, 5], 64)
        compute_on(monkeypatch, gpu=False)
        assert emulated and ours == greedy_batch(model, prompts, [4, 6, 5], 64)
    finally:
        kv4.mlx.detach(model)


@needs_gpu
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper()], ids=["default", "paper"])
def test_rows_of_a_batch_are_one_launch_and_each_what_it_is_alone(recipe, emulated, monkeypatch):
    launches = []
    run = gpu.MlxHost.run
    monkeypatch.setattr(gpu.MlxHost, "run", lambda self, name, *x: launches.append(name) or run(self, name, *x))

    def rows(heads, tokens, count):
        return mx.random.normal((count, heads, tokens, 64), key=mx.random.key(len(launches)))

    def attended(cache, k, v, q):
        handles = cache.update_and_fetch(k, v)
        launches.clear()
        return kv4.mlx.scaled_dot_product_attention(q, *handles, cache, 0.1, "causal")

    def step(batch, alone, tokens, padding=None):
        padding = padding or [0] * len(alone)
        k, v, q = (rows(heads, tokens, len(alone)) for heads in (HEADS, HEADS, HEADS * GROUP))
        ours = attended(batch, k, v, q)
        assert tokens > 64 or sum("attend" in name for name in launches) == 1
        for i, (cache, lo) in enumerate(zip(alone, padding, strict=True)):
            theirs = attended(cache, *(x[i : i + 1, :, lo:] for x in (k, v, q)))
            assert not mx.any(ours[i, :, :lo])
            assert float(mx.abs(ours[i : i + 1, :, lo:] - theirs).max()) <= 1e-5 * float(mx.abs(theirs).max())

    alone = [KV4Cache(recipe) for _ in range(3)]
    batch = BatchKV4Cache([KV4Cache(recipe) for _ in range(3)], [60, 0, 25])
    for tokens, padding in ((100, [60, 0, 25]), (1, None), (40, None), (1, None)):
        step(batch, alone, tokens, padding)
    assert batch.nbytes == batch.core.nbytes() and [row.offset for row in batch.rows] == [82, 142, 117]
    twin, others = copy.deepcopy(batch), copy.deepcopy(alone)
    batch.filter([2, 0])
    alone = [alone[2], alone[0]]
    step(batch, alone, 1)
    late = KV4Cache(recipe)
    attended(late, *(rows(heads, 90, 1) for heads in (HEADS, HEADS, HEADS * GROUP)))
    alone.append(copy.deepcopy(late))
    batch.extend(BatchKV4Cache([late]))
    step(batch, alone, 1)
    assert batch.trim(1) == 1 and all(cache.trim(1) == 1 for cache in alone)
    step(batch, alone, 3)
    row = batch.extract(2)
    assert row.offset == 93 == row.core.length and row.core.batch == 1
    k, q = rows(HEADS, 1, 1), rows(HEADS * GROUP, 1, 1)
    ours, theirs = (attended(cache, k, k, q) for cache in (row, alone[2]))
    assert float(mx.abs(ours - theirs).max()) <= 1e-5 * float(mx.abs(theirs).max())
    step(twin, others, 2)  # as it was


@needs_gpu
def test_a_cache_on_the_gpu_as_mlx_lm_uses_it(emulated, tmp_path):
    cache = KV4Cache()
    k = mx.random.normal((1, 2, 300, 64), key=mx.random.key(1))
    handles = cache.update_and_fetch(k, k)
    kv4.mlx.scaled_dot_product_attention(mx.random.normal((1, 4, 300, 64)), *handles, cache, 0.1, "causal")
    mx.eval([cache.state])
    assert handles[0].dense().shape == (1, 2, 300, 64)
    cache.update_and_fetch(k[:, :, :1], k[:, :, :1])
    assert cache.core.sealed_tokens(0) > 0 and cache.nbytes == cache.core.nbytes()
    assert cache.is_trimmable() and cache.trim(100) == 100 and cache.core.length == 201
    twin = copy.deepcopy(cache)
    twin.trim(50)
    assert (cache.core.length, twin.core.length) == (201, 151)
    with pytest.raises(ValueError, match="kv4 cache"):
        stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])


# Where there is no GPU of Metal's.


def test_the_cpu_is_served_by_the_cpp_core():
    assert isinstance(core.new_core(Recipe(), dtype="float32", kv_heads=1, head_dim_k=32, head_dim_v=32), core.HostCore)


@pytest.mark.parametrize(
    ("metal", "macos", "dim", "recipe", "error", "match"),
    [
        (
            False,
            "",
            64,
            Recipe(),
            RuntimeError,
            r"^device: expected a Metal device, or mx.set_default_device\(mx.cpu\)",
        ),
        (True, "13.6", 64, Recipe(), RuntimeError, r"^device: expected macOS 14.0 or newer .*; got macOS 13.6"),
        (True, "15.1", 72, Recipe(), NotImplementedError, "^head_dim: expected one of 64, 80, 96, 128, 256 on Metal"),
        (
            True,
            "15.1",
            64,
            Recipe(key=Side(group=32)),
            NotImplementedError,
            "recipe.k.group: expected one scale per vector",
        ),
    ],
)
def test_each_reason_why_a_gpu_is_refused(monkeypatch, metal, macos, dim, recipe, error, match):
    compute_on(monkeypatch, gpu=True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(metal_host.platform, "mac_ver", lambda: (macos, ("", "", ""), ""))
    gpu.gpu_host.cache_clear()
    x = mx.zeros((1, 1, 3, dim))
    cache = KV4Cache(recipe)
    with pytest.raises(error, match=match):
        cache.update_and_fetch(x, x)
    gpu.gpu_host.cache_clear()
    assert cache.core is None and cache.offset == 0
    reason = kv4.mlx.why_not(model_of("llama", head_dim=dim), recipe)
    assert reason is not None and match.lstrip("^").split(":")[0].split(".")[0] in reason


def test_other_dtypes_are_refused(monkeypatch):
    compute_on(monkeypatch, gpu=True)
    x = mx.zeros((1, 1, 3, 64), mx.int32)
    with pytest.raises(ValueError, match="^keys: expected float32, float16 or bfloat16"):
        KV4Cache().update_and_fetch(x, x)
