"""kv4.metal against the C++ core: the same policy, codes and attention, its kernels run in emulation. Nothing here ran
on an Apple GPU."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch

import hf_cases
import kv4.hf
import kv4.hf.layer
import kv4.metal.mps
import kv4.metal.sealing
from hf_cases import one_thread  # noqa: F401, a fixture
from kv4 import Recipe, Side, _core
from kv4.metal import source
from kv4.metal.host import _constants, _matrices
from kv4.metal.mps import MetalCache, TorchHost
from kv4.shared import total_bytes
from metal_cases import GROUP, HEADS, RECIPES, TOLERANCE, Pair
from metal_device import EmulatedLibrary, host, needs_emulator


@needs_emulator
@pytest.mark.parametrize("name", RECIPES)
def test_policy_codes_and_attention_are_the_cores(name):
    pair = Pair(RECIPES[name])
    for tokens in (100, 1, 40, 64, 1, 200, 1, 63, 1):
        pair.step(tokens)


@needs_emulator
@pytest.mark.parametrize("name", ["default", "exact", "paper"])
def test_a_sliding_window_evicts_as_the_core_does(name):
    pair = Pair(RECIPES[name], sliding_window=150)
    for tokens in (90, 1, 64, 200, 1, 64, 1):
        pair.step(tokens)
    assert pair.core.first > 0
    with pytest.raises(IndexError, match="sliding window"):
        pair.metal.crop(10)
    recording = Pair(RECIPES[name], sliding_window=150)
    recording.both("record_past", True)
    for tokens in (300, 1):
        recording.step(tokens)
    recording.both("crop", 100)
    recording.step(3)


@needs_emulator
@pytest.mark.parametrize("name", ["default", "exact"])
def test_left_padding_stays_out_of_pages(name):
    pair = Pair(RECIPES[name], batch=3)
    start = torch.tensor([0, 37, 90], dtype=torch.int32)
    for tokens in (120, 1, 64, 100, 1, 1):
        pair.step(tokens, start=start)


@needs_emulator
@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("length", [330, 250, 201, 100, 40, 2, 0])
def test_crop_goes_back_as_the_core_does(name, length):
    pair = Pair(RECIPES[name])
    for tokens in (300, 1, 40):
        pair.step(tokens)
    pair.both("crop", length)
    for tokens in (1, 64, 70):
        pair.step(tokens)


@needs_emulator
def test_a_call_that_is_cropped_leaves_no_trace():
    pair = Pair(Recipe())
    pair.step(300)
    for _ in range(6):
        pair.step(20)
        pair.both("crop", pair.core.length - 13)


@needs_emulator
def test_forks_share_pages_and_go_their_own_way():
    pair = Pair(Recipe(), batch=2, seed=6)  # 5 has a key on a decision boundary, which may go either way
    pair.step(300)
    pair.step(1)
    used = pair.metal.pool.count - len(pair.metal.pool.free)
    pair.both("select", [1, 1, 0])
    assert pair.metal.pool.count - len(pair.metal.pool.free) == used
    pair.step(70)
    pair.both("repeat", 2)
    pair.both("select", [5, 0])
    pair.step(1)
    used = pair.metal.pool.count - len(pair.metal.pool.free)
    twins = pair.metal.clone(), pair.core.clone()
    assert pair.metal.pool.count - len(pair.metal.pool.free) == used, "clones share pages"
    pair.step(64)
    pair.metal, pair.core = twins
    pair.compare()
    pair.step(3)
    pair.both("reset")
    assert pair.metal.nbytes() < 1 << 20
    pair.batch = 1
    pair.step(5)


@needs_emulator
def test_caches_share_a_rotation_s_matrices_until_the_last_is_gone():
    gc.collect()
    before = len(_matrices), len(_constants)
    seed = 77  # no other test's
    recipe = Recipe(key=Side(seed=seed, mean=True, lambda_="auto"), value=Side(seed=seed))
    caches = [Pair(recipe).metal for _ in range(3)] + [Pair(recipe, dtype=torch.float16).metal]
    assert len({id(cache.constants) for cache in caches}) == 2, "one for each dtype"
    assert len({id(matrices) for cache in caches for matrices in cache.constants.matrices}) == 1
    shared = [cache.shared() for cache in caches]
    assert shared[0] == shared[1] and len(shared[0]) == 3 and all(nbytes > 0 for _, nbytes, _ in shared[0])
    assert [on_device for _, _, on_device in shared[0]] == [True, True, False]
    assert shared[0][2][:2] == Pair(recipe).core.shared()[0][:2], "the C++ core's own"
    own = sum(cache.nbytes() - sum(nbytes for _, nbytes, _ in cache.shared()) for cache in caches)
    distinct = {identity: nbytes for listed in shared for identity, nbytes, _ in listed}
    assert total_bytes(caches) == own + sum(distinct.values())
    other = Pair(Recipe(key=Side(seed=seed + 1, mean=True, lambda_="auto"), value=Side(seed=seed))).metal
    assert other.constants.matrices[0] is not other.constants.matrices[1] is caches[0].constants.matrices[0]
    del caches, other
    gc.collect()
    assert (len(_matrices), len(_constants)) == before


@needs_emulator
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("kind", ["bool", "additive", "softcap", "sinks", "all", "window"])
def test_masks(kind, tokens):
    pair = Pair(Recipe(), batch=2)
    pair.step(260)
    pair.step(1)
    length = 261 + tokens
    options: dict = {"scale": 0.2}
    if kind == "bool":
        mask = torch.rand((2, 1, tokens, length - 10), generator=pair.random) > 0.4
        mask[..., -1] = True
        options |= {"mask": mask, "offset": 10, "causal": False}
    elif kind == "additive":
        mask = torch.randn((1, HEADS * GROUP, tokens, length), generator=pair.random)
        options |= {"mask": mask.masked_fill(mask > 1.5, -torch.inf), "causal": False}
    elif kind == "softcap":
        options |= {"softcap": 3.0}
    elif kind == "sinks":
        options |= {"sinks": torch.tensor([0.0, 2.0, -3.0, 5.0])}
    elif kind == "all":
        options |= {"causal": False}
    else:
        options |= {
            "window": torch.tensor([100, 0], dtype=torch.int32),
            "start": torch.tensor([0, 30], dtype=torch.int32),
        }
    pair.step(tokens, **options)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [80, 128])
def test_half_precision_and_other_head_dims(dtype, dim):
    pair = Pair(Recipe(), dim=dim, dtype=dtype)
    for tokens in (150, 1, 64):
        pair.step(tokens)


@needs_emulator
def test_given_lambda_and_a_dense_rotation():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.linalg.qr(torch.randn((64, 64), generator=generator))[0].contiguous()
    side = Side(rotation="dense", mean=True, lambda_="given")
    recipe = Recipe(key=side, value=Side(lambda_="given"))
    scale = torch.rand((HEADS, 64), generator=generator) + 0.5
    pair = Pair(recipe, lambda_k=scale, lambda_v=scale.flip(0).contiguous(), matrix_k=matrix)
    for tokens in (200, 1, 64):
        pair.step(tokens)
    pair = Pair(Recipe.paper(lambda_="given"), lambda_k=scale)
    for tokens in (70, 1, 3):
        pair.step(tokens)


@needs_emulator
def test_partial_states_and_dense_rows():
    pair = Pair(Recipe())
    pair.step(300)
    pair.step(1)
    k, v, q = pair.normal(HEADS, 80), pair.normal(HEADS, 80), pair.normal(4, 80)
    states = []
    for cache in (pair.metal, pair.core):
        cache.append(k, v)
        o, m, total = torch.empty(1, 4, 80, 64), torch.empty(1, 4, 80), torch.empty(1, 4, 80)
        cache.attend_partial(q, o, m, total, upto=301)
        states.append((o / total[..., None], m + total.log()))
        with pytest.raises(IndexError, match="upto"):
            cache.attend_partial(q, o, m, total, upto=100)
    assert (states[0][0] - states[1][0]).abs().max() <= TOLERANCE * states[1][0].abs().max()
    assert torch.allclose(states[0][1], states[1][1], atol=TOLERANCE * 5)
    for name in ("dense_keys", "dense_values"):
        rows = [torch.empty(1, HEADS, 300, 64) for _ in range(2)]
        getattr(pair.metal, name)(50, 300, rows[0])
        getattr(pair.core, name)(50, 300, rows[1])
        assert (rows[0] - rows[1]).abs().max() <= 1e-3 * rows[1].abs().max()


@needs_emulator
def test_every_launch_passes_the_emulators_checker():
    """Races, bounds, uninitialised reads, alignment: the tables and buffers that this host hands to the kernels."""
    for recipe in (Recipe(), Recipe.paper()):
        pair = Pair(recipe, batch=2, mode="check", sliding_window=170)
        for tokens in (140, 1, 3):
            pair.step(tokens, start=torch.tensor([0, 5], dtype=torch.int32))
        pair.both("crop", 80)
        pair.step(1)


@needs_emulator
def test_non_finite_rows_are_held_as_zeros():
    cache = Pair(Recipe.exact()).metal
    k = torch.randn(1, HEADS, 5, 64)
    k[0, 1, 2, 3] = torch.nan
    cache.append(k, torch.randn(1, HEADS, 5, 64))
    rows = torch.empty(1, HEADS, 5, 64)
    cache.dense_keys(0, 5, rows)
    assert not rows[0, 1, 2].any() and torch.equal(rows[0, 0], k[0, 0])


@needs_emulator
def test_calls_that_do_not_fit_are_refused_and_change_nothing():
    pair = Pair(Recipe())
    pair.step(10)
    cache, x = pair.metal, torch.zeros(1, HEADS, 3, 64)
    q, out = torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 1, 64)
    for error, call, match in (
        (ValueError, lambda: cache.append(x.half(), x.half()), "^k: expected dtype float32"),
        (ValueError, lambda: cache.append(x[:, :1], x[:, :1]), "^k: expected shape"),
        (ValueError, lambda: cache.append(x, x[:, :, :2]), "^v: expected the batch and tokens"),
        (ValueError, lambda: cache.append(x.to("meta"), x), "^k: expected an array on the cache's device; got meta"),
        (ValueError, lambda: cache.attend(q[:, :3], out), "^out: expected shape"),
        (ValueError, lambda: cache.attend(q[:, :3], out[:, :3]), "^q: expected shape"),
        (ValueError, lambda: cache.attend(q, out, softcap=-1.0), "^softcap: expected"),
        (ValueError, lambda: cache.attend(q, out, mask=torch.ones(2, 1, 1, 10) > 0), "^mask: expected"),
        (IndexError, lambda: cache.crop(11), "^length: expected 0 to 10"),
        (IndexError, lambda: cache.select([1]), "^rows: expected"),
        (IndexError, lambda: cache.page_count(1), "^row: expected"),
        (ValueError, lambda: cache.repeat(0), "^times: expected"),
        (RuntimeError, lambda: Pair(Recipe()).metal.attend(q, out), "^q: expected a cache that holds tokens"),
    ):
        with pytest.raises(error, match=match):
            call()
    pair.compare()


def states(q: torch.Tensor) -> list[torch.Tensor]:
    return [torch.zeros_like(q), torch.zeros(q.shape[:3]), torch.zeros(q.shape[:3])]


# By the beginning of the answer: calls of a cache on queries [2, 4, 4, 64] that fit but for one argument.
REFUSALS = {
    "upto: expected at least": lambda c, q: c.attend_partial(q, *states(q), upto=50),
    "mask: expected dtype bool or": lambda c, q: c.attend(q, q.clone(), mask=torch.ones(1, 1, 4, 200).long()),
    "mask: expected an array on": lambda c, q: c.attend(q, q.clone(), mask=torch.ones(1, 1, 4, 200, device="meta")),
    "sinks: expected 4 values": lambda c, q: c.attend(q, q.clone(), sinks=torch.zeros(3)),
    "start: expected 2 int32 values": lambda c, q: c.attend(q, q.clone(), start=torch.zeros(1, dtype=torch.int32)),
    "window: expected 2 int32 values": lambda c, q: c.attend(q, q.clone(), window=torch.tensor([1.0, 2.0])),
    "scale: expected a number": lambda c, q: c.attend(q, q.clone(), scale=float("nan")),
    "softcap: expected": lambda c, q: c.attend(q, q.clone(), softcap=float("nan")),
    "scale: expected a number; got inf": lambda c, q: c.attend(q, q.clone(), scale=float("inf")),
    "softcap: expected 0 .none. or a positive number; got inf": lambda c, q: c.attend(
        q, q.clone(), softcap=float("inf")
    ),
    "mask.offset: expected a position": lambda c, q: c.attend(
        q, q.clone(), start=torch.zeros(2, dtype=torch.int32), offset=1 << 40
    ),
    "dtype: expected float32": lambda c, q: c.attended(q, dtype="float64"),
    "q: expected shape": lambda c, q: c.attended(q[0]),
    "q: expected dtype float32": lambda c, q: c.attended(q.double()),
    "out: expected float32": lambda c, q: c.attend(q, q.double()),
    "out: expected an array on": lambda c, q: c.attend(q, q.to("meta")),
    "out: expected a place of its own": lambda c, q: c.attend(q, q[:, :1].clone().expand(q.shape)),
    "out: expected a tensor that does not": lambda c, q: c.attend(q, q.clone().requires_grad_()),
    "o: expected shape": lambda c, q: c.attend_partial(q, q[0].clone(), *states(q)[1:], upto=160),
    "m: expected shape": lambda c, q: c.attend_partial(q, q.clone(), q.clone(), states(q)[2], upto=160),
}


@needs_emulator
@pytest.mark.parametrize("begins", REFUSALS)
def test_a_refused_call_leaves_no_trace_in_what_follows(begins):
    """A twin never sees it: masks, energies and pages are then the same to the bit."""
    pair = Pair(Recipe(), batch=2)
    start = torch.tensor([0, 40], dtype=torch.int32)
    k, v = pair.normal(HEADS, 200), pair.normal(HEADS, 200)
    twins = [pair.metal, Pair(Recipe(), batch=2).metal]
    for cache in twins:
        cache.append(k, v)
    with pytest.raises((ValueError, IndexError), match=f"^{begins}"):
        REFUSALS[begins](twins[0], 100 * pair.normal(4, 4))
    for _ in range(2):
        q, k, v = pair.normal(4, 1), pair.normal(HEADS, 1), pair.normal(HEADS, 1)
        outs = [torch.zeros_like(q) for _ in twins]
        for cache, out in zip(twins, outs, strict=True):
            cache.attend(q, out, start=start)
            cache.append(k, v)
        assert torch.equal(*outs)
    assert [twins[0].lambda_(b) for b in range(2)] == [twins[1].lambda_(b) for b in range(2)]
    for b in range(2):
        assert twins[0].page_count(b) == twins[1].page_count(b) > 0
        for page in range(twins[0].page_count(b)):
            assert twins[0].page_codes(b, page, 0) == twins[1].page_codes(b, page, 0)


@needs_emulator
def test_a_crop_that_a_device_cannot_finish_leaves_every_sequence(monkeypatch):
    pair = Pair(Recipe(), batch=2, seed=6)  # as above
    pair.step(300)
    pair.step(1)
    pair.metal.seal()
    pair.core.seal()
    launches = []

    def fails(*arguments):
        launches.append(arguments)
        if len(launches) == 3:
            raise MemoryError("no memory")
        return dequantise(*arguments)

    dequantise = kv4.metal.sealing.dequantise
    monkeypatch.setattr(kv4.metal.sealing, "dequantise", fails)
    with pytest.raises(MemoryError):
        pair.metal.crop(100)
    monkeypatch.undo()
    pair.compare()
    pair.step(3)
    pair.both("crop", 100)
    pair.step(1)


@needs_emulator
def test_pages_and_heads_that_are_not_there_are_refused():
    pair = Pair(Recipe())
    pair.step(200)
    pair.both("seal")
    for error, arguments in (("index", (0, -1, 0)), ("index", (0, 2, 0)), ("head", (0, 0, HEADS)), ("row", (1, 0, 0))):
        for cache in (pair.metal, pair.core):
            with pytest.raises(IndexError, match=f"^{error}: expected 0 to "):
                cache.page_codes(*arguments)


@needs_emulator
def test_recipes_without_kernels_are_refused_with_the_reason():
    for recipe, dims, match in (
        (Recipe(key=Side(group=32), value=Side()), (64, 64), "one scale per vector on Metal"),
        (Recipe(), (64, 128), "head_dim_v: expected head_dim_k"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            MetalCache(host(64), recipe, dtype="float32", kv_heads=1, head_dim_k=dims[0], head_dim_v=dims[1])


# Models of transformers, on tensors of the CPU in place of an Apple GPU's.


@pytest.fixture
def emulated(monkeypatch):
    """Every new layer is a MetalCache; the list of them."""
    made = []

    def new_core(device, recipe, **arguments):
        made.append(MetalCache(host(arguments["head_dim_k"]), recipe, **arguments))
        return made[-1]

    monkeypatch.setattr(kv4.hf.layer, "new_core", new_core)
    return made


@needs_emulator
@pytest.mark.parametrize("scenario", ["padded", "beams", "prompt_lookup"])
@pytest.mark.parametrize("name", ["llama", "gemma3_64"])
def test_generate_gives_the_tokens_of_the_cpu(name, scenario, emulated, monkeypatch):
    if name == "gemma3_64":
        monkeypatch.setitem(
            hf_cases.MODELS, name, ("Gemma3", {**hf_cases._MIXED, "query_pre_attn_scalar": 24, "head_dim": 64})
        )
        monkeypatch.setattr(hf_cases, "SLIDING", (*hf_cases.SLIDING, name))
    model = hf_cases.model_of(name, sliding_window=90)
    run = {
        "padded": lambda: model.generate(**hf_cases.left_padded(2, 150), max_new_tokens=12),
        "beams": lambda: model.generate(hf_cases.tokens_of(1, 150), num_beams=3, max_new_tokens=8),
        "prompt_lookup": lambda: model.generate(
            hf_cases.repetitive(150), prompt_lookup_num_tokens=4, max_new_tokens=12
        ),
    }[scenario]
    kv4.hf.attach(model)
    try:
        ours = run()
        assert emulated and all(cache.length >= 150 for cache in emulated)
        monkeypatch.setattr(kv4.hf.layer, "new_core", lambda device, recipe, **x: _core.Cache(recipe, **x))
        assert torch.equal(ours, run())
    finally:
        kv4.hf.detach(model)


@needs_emulator
def test_deepcopy_of_a_cache(emulated):
    model = kv4.hf.attach(hf_cases.model_of("llama"))
    try:
        cache = kv4.hf.new_cache(model)
        model(hf_cases.tokens_of(1, 200), past_key_values=cache)
        for core in emulated:
            core.seal()
        twin = copy.deepcopy(cache)
        model(hf_cases.tokens_of(1, 3), past_key_values=twin)
        assert (cache.get_seq_length(), twin.get_seq_length()) == (200, 203)
        assert torch.equal(cache.layers[0].keys, twin.layers[0].keys[:, :, :200])
    finally:
        kv4.hf.detach(model)


# The host itself.


def test_a_machine_without_metal_gets_an_error_that_says_so():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has a Metal device")
    with pytest.raises(RuntimeError, match=r"^device: expected .*; got"):
        kv4.metal.mps.mps_host(64)
    assert kv4.metal.mps.why_not().startswith("device: expected")


@pytest.mark.parametrize(
    ("built", "newer", "available", "match"),
    [
        (False, True, True, "^device: expected a PyTorch built with MPS"),
        (True, False, True, r"^device: expected macOS 14\.0 or newer"),
        (True, True, False, "^device: expected a Metal device; got none"),
    ],
)
def test_each_reason_why_there_is_no_device(monkeypatch, built, newer, available, match):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: newer)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    assert re.search(match, kv4.metal.mps.why_not())


class _Library:
    """Kernels that say what a device gives them."""

    def __init__(self, threads: int, memory: int) -> None:
        self.threads, self.memory = threads, memory

    def __getattr__(self, name: str):
        return type("Kernel", (), {"max_threads_per_threadgroup": self.threads,
                                   "static_thread_group_memory_length": self.memory})  # fmt: skip


def test_a_device_that_gives_too_little_is_refused_before_anything_is_allocated():
    with pytest.raises(NotImplementedError, match="^head_dim: expected one of 64, 80, 96, 128, 256 on Metal; got 72"):
        TorchHost("cpu", 72, lambda text: pytest.fail("compiled"))
    with pytest.raises(RuntimeError, match="128 threads per threadgroup for kv4_attend_d64_r8; got 64"):
        TorchHost("cpu", 64, lambda text: _Library(64, 1024))
    with pytest.raises(RuntimeError, match="at most 32768 bytes of threadgroup memory .*got 40000"):
        TorchHost("cpu", 64, lambda text: _Library(1024, 40000))
    assert TorchHost("cpu", 64, lambda text: _Library(1024, 32768)).nothing.numel() == 16


@pytest.mark.parametrize("dim", [64, 256])
def test_the_source_is_one_text(dim):
    text = source.text(dim)
    assert not re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE)
    for name in ("kv4_prepare", "kv4_seal", "kv4_merge", "kv4_dequantise"):
        assert len(re.findall(rf"^kernel void {name}\(", text, re.MULTILINE)) == 1
    assert set(re.findall(r'host_name\("kv4_attend_d(\d+)_r', text)) == {str(dim)}


@needs_emulator
def test_the_stand_in_reports_what_the_checker_finds():
    """A launch with a buffer that is too small is an error here, so that a wrong table cannot pass."""
    library = EmulatedLibrary(source.text(64), "check")
    zeros = torch.zeros(16, dtype=torch.uint8)
    jobs, side = torch.tensor([[0, 0, 64, 0, -1, 0, 64, 64, 0, -(1 << 62)]]), torch.zeros(13, dtype=torch.int64)
    side[0] = 64
    with pytest.raises(AssertionError):
        library.kv4_seal(
            zeros, zeros, zeros, zeros, jobs, side, torch.zeros(25), zeros, threads=[256, 1, 1], group_size=[256, 1, 1]
        )
