"""What the checker finds: each mistake of kernels/faults.metal by its kind, in whatever order lanes run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emulator import Module, Output, asan_environment, asan_library, build, compiler

KERNELS = Path(__file__).resolve().parent / "kernels"
FAULTS = {
    "read_past_end": "out-of-bounds: read of 4 bytes of in at byte 256 of 256",
    "write_past_end": "out-of-bounds: write of 4 bytes of out at byte 256 of 256",
    "far_away": "out-of-bounds: read of 4 bytes far from every buffer",
    "no_barrier": "race: threadgroup tile",
    "barrier_of_nothing": "race: threadgroup tile",
    "barrier_of_other_memory": "race: device out",
    "no_simdgroup_barrier": "race: threadgroup tile",
    "same_word": "race: device out",
    "between_groups": "race: device out",
    "uninitialised_group": "uninitialised: threadgroup tile",
    "uninitialised_output": "uninitialised: device out",
    "group_overrun": "out-of-bounds: write of 4 bytes of threadgroup memory outside every array",
    "misaligned": "misaligned: 16 bytes of in",
    "write_input": "read-only: in written",
    "lost_lanes": "inactive-lanes: simd_sum",
    "branch_around_simd": "divergence: SIMD-group",
    "branch_around_barrier": "divergence: thread 0 is at the threadgroup_barrier of line",
    "early_return": "deadlock: threadgroup 0,0,0: 60 threads wait",
    "shuffle_from_nowhere": "undefined-lane: simd_shuffle_xor",
    "too_much_group_memory": "group-memory: 32772 bytes of threadgroup memory with tile",
    "wide_shift": "undefined: shift",
    "wild_conversion": "undefined: floating-point value outside the range",
}
LINES = (KERNELS / "faults.metal").read_text().splitlines()


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(build(KERNELS / "faults.metal", "check"))


def reports(module: Module, kernel: str, seed: int) -> list[str]:
    threads = 128 if kernel == "between_groups" else 64
    x = np.linspace(0, 1, 64, dtype=np.float32)
    return module.run(kernel, threads, 64, [x, Output(np.zeros(64, np.float32)), 64], seed=seed).reports


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", FAULTS)
def test_fault_is_named(module: Module, kernel: str, seed: int) -> None:
    found = reports(module, kernel, seed)
    assert any(line.startswith(FAULTS[kernel]) for line in found), found


@pytest.mark.parametrize("kernel", ["no_barrier", "read_past_end", "wide_shift", "misaligned"])
def test_the_line_is_named(module: Module, kernel: str) -> None:
    start = next(i for i, line in enumerate(LINES) if f"void {kernel}(" in line)
    end = next(i for i in range(start, len(LINES)) if LINES[i] == "}")
    named = [f"faults.metal:{n}" for n in range(start + 1, end + 1)]
    assert any(place + ")" in line for place in named for line in reports(module, kernel, 0))


def test_nothing_is_found_where_nothing_is_wrong(module: Module) -> None:
    for seed in range(4):
        assert reports(module, "good", seed) == []


def test_every_fault_has_its_line_in_the_table() -> None:
    kernels = {line.split("void ")[1].split("(")[0] for line in LINES if line.startswith("kernel void")}
    assert kernels == {*FAULTS, "good", "private_overrun"}


ASAN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from emulator import Module, Output, build
module = Module(build(sys.argv[2], "asan"))
for kernel in sys.argv[3:]:
    done = module.run(kernel, 64, 64, [np.zeros(64, np.float32), Output(np.zeros(64, np.float32)), 64])
    print(kernel, "|".join(done.reports) or "clean")
"""


@pytest.mark.skipif(compiler() is None or asan_library(compiler()) is None, reason="needs Debian's libclang-rt-19-dev")
def test_address_sanitizer_sees_private_memory(tmp_path: Path) -> None:
    import os

    script = tmp_path / "run.py"
    script.write_text(ASAN)
    kernels = ["good", "private_overrun", "group_overrun", "read_past_end"]
    command = [sys.executable, str(script), str(KERNELS.parent), str(KERNELS / "faults.metal"), *kernels]
    done = subprocess.run(command, env={**os.environ, **asan_environment()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found["good"] == "clean"
    assert found["private_overrun"].startswith("address: stack-buffer-overflow, read")
    assert found["group_overrun"].startswith("address: use-after-poison, write")
    assert found["read_past_end"].startswith("address: ")
