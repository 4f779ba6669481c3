"""What the emulator computes: each feature of the language against its definition, in several lane orders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emulator import MetalError, Module, Output, build

KERNELS = Path(__file__).resolve().parent / "kernels"
SEEDS = [0, 1, 2, 7]
random = np.random.default_rng(4)


@pytest.fixture(scope="module", params=["fast", "fastmath", "check"])
def module(request: pytest.FixtureRequest) -> Module:
    return Module(build(KERNELS / "features.metal", request.param))


def run(module: Module, kernel: str, threads, group, *arguments, **options):
    done = module.run(kernel, threads, group, arguments, **options)
    assert done.result == "ran" and not done.reports, done
    return done


def test_vectors(module: Module) -> None:
    v = np.array([1, 2, 3, 4], np.float32)
    out = np.zeros(10, np.float32)
    run(module, "vectors", 1, 1, Output(out), v)
    # a = (3, 4, 3 + 1, 4); v * 1.5 = (1.5, 3, 4.5, 6) rounds to even
    next_float = np.nextafter(np.float32(2), np.float32(3))
    want = [3 + 8 + 12 + 16, 3 + 20 + 300, 10, 1 + 20 + 300 + 4000, 3, 2 + 30 + 400, -1, 4, next_float, 1.5 + 3.5 + 5]
    assert out.tolist() == [float(x) for x in want]


def test_packed_types_need_no_alignment(module: Module) -> None:
    x = random.standard_normal((7, 3)).astype(np.float32)
    halves, out = np.zeros((7, 4), np.float16), np.zeros(7, np.float32)
    run(module, "packed", 7, 7, x, Output(halves), Output(out), offset=4)
    assert np.array_equal(halves, np.concatenate([x, np.ones((7, 1))], 1).astype(np.float16))
    assert np.allclose(out, x.sum(1), atol=1e-6)


def as_bfloat(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def test_bfloat_rounds_after_each_operation(module: Module) -> None:
    x = as_bfloat(random.standard_normal(64))
    out = np.zeros(64, np.uint16)
    run(module, "bfloats", 64, 32, x, Output(out))
    product = from_bfloat(as_bfloat(from_bfloat(x) * np.float32(1.01)))
    assert np.array_equal(out, as_bfloat(product + from_bfloat(x)))


def test_matrices_are_columns(module: Module) -> None:
    columns = random.standard_normal((4, 4)).astype(np.float32)
    out = np.zeros((2, 4), np.float32)
    run(module, "matrices", 1, 1, columns, Output(out))
    assert np.allclose(out[0], columns.T @ [1, 2, 3, 4], atol=1e-5)
    assert np.array_equal(out[1], columns[:, 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_simdgroup_matrices(module: Module, seed: int) -> None:
    a, b = random.standard_normal((2, 8, 8)).astype(np.float16)
    out = np.zeros((8, 8), np.float32)
    done = run(module, "tiles", 32, 32, a, b, Output(out), threadgroup=[128], seed=seed)
    assert np.allclose(out, 1 + a.astype(float) @ b.astype(float).T, atol=1e-5)
    assert done.stats.group_bytes == 128


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes(module: Module, seed: int) -> None:
    out = np.zeros((7, 32), np.float32)
    run(module, "lanes", 32, 32, Output(out), seed=seed)
    lane = np.arange(32)
    assert (out[0] == lane.sum()).all()
    assert np.array_equal(out[1], np.cumsum(lane) - lane)
    assert np.array_equal(out[2], lane ^ 5)
    assert np.array_equal(out[3], np.where(lane < 28, lane + 4, lane))
    assert np.array_equal(out[4], lane // 4 * 4 + 2)
    assert (out[5] == 31).all()
    assert (out[6] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_count_everything_once(module: Module, seed: int) -> None:
    values = random.integers(0, 8, 1000).astype(np.uint32)
    bins = np.zeros(8, np.uint32)
    run(module, "histogram", 1024, 128, values, bins, 1000, seed=seed)
    assert np.array_equal(bins, np.bincount(values, minlength=8))


def test_partial_threadgroups(module: Module) -> None:
    out = np.zeros((5, 50, 8), np.uint32)
    done = run(module, "positions", (50, 5), (20, 4), Output(out))
    assert done.stats.threads == 250 and done.stats.groups == 6
    for y in range(5):
        for x in range(50):
            width, height = min(20, 50 - x // 20 * 20), min(4, 5 - y // 4 * 4)
            index = (y % 4) * width + x % 20
            want = [width, height, 20, x // 20 + 10 * (y // 4), index, index % 32, index // 32]
            assert out[y, x].tolist() == [*want, -(-width * height // 32)]


def test_flush_to_zero(module: Module) -> None:
    x = np.array([1.0, 2e-38, -2e-38, 1e-39], np.float32)  # halves of the second and third are denormal
    kept, flushed = np.zeros(4, np.float32), np.zeros(4, np.float32)
    run(module, "denormals", 4, 4, x, Output(kept))
    run(module, "denormals", 4, 4, x, Output(flushed), flush=True)
    assert np.array_equal(kept, x / 2) and kept[3] != 0
    assert flushed.tolist() == [0.5, 0, 0, 0]


def test_instances_of_a_template(module: Module) -> None:
    for name, dtype, n in (
        ("totals_f16_3", np.float16, 3),
        ("totals_f32_4", np.float32, 4),
        ("totals_u8_5", np.uint8, 5),
    ):
        x = random.integers(0, 9, (6, n)).astype(dtype)
        out = np.zeros(6, np.float32)
        run(module, name, 6, 4, x, Output(out))
        assert np.array_equal(out, x.sum(1))


def test_function_constants(module: Module) -> None:
    x = np.ones(3, np.float32)
    module.set_constant("kFactor", np.float32(2.5))
    run(module, "scaled", 3, 3, x)
    assert x.tolist() == [2.5] * 3
    with pytest.raises(KeyError, match="kOther"):
        module.set_constant("kOther", np.float32(1))


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_lanes_does_not_matter(module: Module, seed: int) -> None:
    x = random.integers(0, 1000, 512).astype(np.uint32)
    out = np.zeros(512, np.uint32)
    run(module, "relay", 512, 256, x, Output(out), seed=seed)
    following = np.concatenate([np.roll(half, -1) for half in x.reshape(2, 256)])
    pairs = following + following.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert np.array_equal(out, np.concatenate([half[::-1] for half in pairs.reshape(2, 256)]))


def test_bytes_are_counted() -> None:
    module = Module(build(KERNELS / "features.metal", "check"))
    x, out = np.zeros((6, 4), np.float32), np.zeros(6, np.float32)
    stats = run(module, "totals_f32_4", 6, 6, x, Output(out)).stats
    assert (stats.device_read, stats.device_read_unique) == (96, 96)
    assert (stats.device_written, stats.device_written_unique) == (24, 24)
    stats = run(module, "relay", 256, 256, np.zeros(256, np.uint32), Output(np.zeros(256, np.uint32))).stats
    assert stats.group_bytes == 2048 and stats.group_written == 2048 and stats.group_read == 2048
    assert stats.group_barriers == 2 and stats.simd_operations == 8


def test_bad_launches_say_what_was_expected(module: Module) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(KeyError, match="kernel: expected one of .*; got nothing"):
        module.run("nothing", 1, 1, [])
    with pytest.raises(ValueError, match="arguments: expected 2 of denormals; got 1"):
        module.run("denormals", 1, 1, [x])
    with pytest.raises(TypeError, match="out: expected an array"):
        module.run("denormals", 1, 1, [x, 3])
    done = module.run("denormals", 2048, 1025, [x, x])
    assert done.result == "bad launch" and "expected 1 to 1024 threads" in done.reports[0]
    done = module.run("tiles", 32, 32, [x, x, x])
    assert done.result == "stopped" and "[[threadgroup(0)]] has no length" in done.reports[0]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: expected one of fast, .*; got slow"):
        build(KERNELS / "features.metal", "slow")


def test_missing_file_is_an_error_of_the_kernel() -> None:
    with pytest.raises(MetalError, match="no such file"):
        build(KERNELS / "absent.metal", "fast")
