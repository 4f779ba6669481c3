"""Seeds each bug of mutations.py in the kernels and says which layer of checks finds it; fails if one is missed.

    python tests/metal/mutate.py --tests build/release/tests/metal/kv4_metal_tests     records launches, then all bugs
    python tests/metal/mutate.py --tests ... --sample       one bug for each kernel and layer that has to find one in it
    python tests/metal/mutate.py --launches FOLDER --only "nibble"                      bugs by name, recorded launches

The launches are those of the kernels' own tests. A result is kept beside the modules under a hash of the changed text
and the launches: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from emulator import MetalError, Module, asan_environment, asan_library, build, compiler, load
from emulator.build import REPOSITORY, cache_folder, tool_hash
from emulator.lint import lint
from emulator.replay import read, replay
from mutations import MUTATIONS, Mutation

HERE = Path(__file__).resolve().parent
SOURCES = REPOSITORY / "src"
ENTRY = {"kv4_seal": "seal", "kv4_dequantise": "seal", "kv4_prepare": "rotate",
         "kv4_attend": "attend", "kv4_merge": "attend"}  # fmt: skip
TESTS = [
    "MetalAttend.GeneralMasksAndSoftcap",
    "MetalAttend.RaggedBatchWithStartsAndWindows",
    "MetalAttend.EveryRotationKind",
    "MetalAttend.OnlyExactRows",
    "MetalAttend.ChunksOfPagesAndBlocksOfRowsDoNotMatter",
    "MetalAttend.SequencesWithRowsOfTheirOwn",
    "MetalAttend.HiddenTokensOfTheFirstPageAreReadFromExactRows",
    "MetalSeal.PartsOfAPage",
    "MetalSeal.HiddenRowsAreMaskedOnes",
    "MetalSeal.DequantisesAsDefined",
]
# Recorded launches that are run of each kernel: the smallest, no two of one shape, so that masks, parts of pages,
# several splits and channels that do not fill the lanes are among them; of kernels of rows and of sealing the largest
# too, which have a rotation's matrix and hidden rows.
LAUNCHES = 3
LARGEST = ("kv4_prepare", "kv4_merge", "kv4_seal", "kv4_dequantise")
TOLERANCE = 2e-3  # of the largest magnitude: the bound of the kernels' own tests of attention
SEED = 3
TIMEOUT = 300  # seconds; a bug may cause an endless loop


def record(tests: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(tests), f"--gtest_filter={':'.join(TESTS)}"]
    done = subprocess.run(command, env={**os.environ, "KV4_METAL_RECORD": str(folder)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def chosen(folder: Path, prefix: str) -> list[Path]:
    """LAUNCHES of each kernel, and of those in LARGEST as many from the other end: no two of one shape."""
    kept: dict[str, list[Path]] = {}
    shapes = set()
    for path in sorted(folder.glob(f"{prefix}*.launch"), key=lambda p: (p.stat().st_size, p.name)):
        launch = read(path)
        shape = (launch.kernel, launch.grid, path.stat().st_size)
        if shape not in shapes:
            shapes.add(shape)
            kept.setdefault(launch.kernel, []).append(path)
    found = []
    for kernel, paths in kept.items():
        found += paths[:LAUNCHES]
        if kernel in LARGEST:
            found += paths[LAUNCHES:][-LAUNCHES:]
    return found


def changed(m: Mutation) -> str:
    text = (SOURCES / "metal" / m.file).read_text()
    at = -1
    for _ in range(m.nth):
        at = text.find(m.old, at + 1)
        if at < 0:
            raise SystemExit(f"{m.name}: {m.file}: expected {m.nth} times {m.old!r}; the kernels have changed")
    return text[:at] + m.new + text[at + len(m.old) :]


def differs(before: bytes, after: bytes, kind: str) -> bool:
    if "float*" not in kind.replace(" *", "*"):
        return before != after
    a, b = np.frombuffer(before, np.float32), np.frombuffer(after, np.float32)
    finite = np.isfinite(a) & (np.abs(a) < 1e30)
    scale = np.abs(a[finite]).max(initial=1e-30)
    return bool((np.abs(a[finite] - b[finite]) > TOLERANCE * scale).any() or not np.isfinite(b[finite]).all()
                or not np.array_equal(a[~finite], b[~finite], equal_nan=True))  # fmt: skip


def run(module: Path, launches: list[Path]) -> list[tuple[list[str], str, list[bytes]]]:
    loaded = Module(module)
    results = []
    for path in launches:
        done, after = replay(loaded, read(path), SEED)
        results.append((done.reports, done.result, after))
        if done.result != "ran":
            break
    return results


def find(m: Mutation, folder: Path, mode: str) -> dict[str, list[str]]:
    """Layer -> what it said. mode "check": everything but asan; "asan": that alone."""
    launches = chosen(folder, m.kernel)
    if not launches:
        raise SystemExit(f"{m.name}: expected recorded launches of {m.kernel}; got none in {folder}")
    only = sorted({read(path).kernel for path in launches})
    entry = ENTRY[m.kernel] + ".metal"
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "metal"
        shutil.copytree(SOURCES / "metal", copy)
        (copy / m.file).write_text(changed(m))
        found: dict[str, list[str]] = {}
        try:
            if mode == "check":
                _, translation = load(copy / entry, [Path(scratch)], only=only)
                if said := lint(translation):
                    return {"lint": said}
            module = build(copy / entry, mode, [Path(scratch)], only=only)
        except MetalError as error:
            found[error.stage] = str(error).splitlines()[:3]
            return found
        results = run(module, launches)
    said = sorted({line for reports, _, _ in results for line in reports})
    if said:
        found["checker" if mode == "check" else "asan"] = said[:8]
    if mode == "check" and numbers_differ(m.kernel, folder, launches, results):
        found["numbers"] = ["outputs differ"]
    return found


def write_baseline(prefix: str, folder: Path) -> None:
    """What the kernels as they are make of the launches."""
    launches = chosen(folder, prefix)
    only = sorted({read(path).kernel for path in launches})
    module = build(SOURCES / "metal" / f"{ENTRY[prefix]}.metal", "check", only=only)
    results = run(module, launches)
    for path, (reports, result, _) in zip(launches, results, strict=True):
        if reports or result != "ran":
            raise SystemExit(f"{path.name}: expected nothing of the kernels as they are; got {result}, {reports}")
    kernels = Module(module).kernels
    types = [[p["type"] if p else "" for p in kernels[read(path).kernel]] for path in launches]
    (folder / f"{prefix}.baseline").write_bytes(pickle.dumps([types, [after for _, _, after in results]]))


def numbers_differ(prefix: str, folder: Path, launches: list[Path], results: list) -> bool:
    types, before = pickle.loads((folder / f"{prefix}.baseline").read_bytes())
    for kinds, was, (_, result, now) in zip(types, before, results, strict=False):
        if result == "ran" and any(differs(*pair) for pair in zip(was, now, kinds, strict=True)):
            return True
    return False


def result_of(m: Mutation, folder: Path) -> dict[str, list[str]]:
    """`find` in processes of its own: a bug may crash, or never end."""
    key = hashlib.sha256()
    for path in [*sorted((SOURCES / "metal").iterdir()), *sorted((SOURCES / "format").iterdir()), Path(__file__)]:
        key.update(path.read_bytes())
    key.update(f"{m} {tool_hash()} {[p.read_bytes() for p in chosen(folder, m.kernel)]}".encode())
    kept = cache_folder() / f"mutation.{key.hexdigest()[:20]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found: dict[str, list[str]] = {}
    for mode in ("check", "asan"):
        if mode == "asan" and (found or asan_library(compiler() or "") is None):
            break
        environment = {**os.environ, **(asan_environment() if mode == "asan" else {})}
        command = [sys.executable, __file__, "--launches", str(folder), "--one", m.name, "--mode", mode]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            found["numbers"] = ["it does not end"]
            break
        if done.returncode:
            raise SystemExit(f"{m.name}: {done.stdout}{done.stderr}")
        found |= json.loads(done.stdout)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, help="kv4_metal_tests, to record launches")
    parser.add_argument("--launches", type=Path, help="folder of recorded launches")
    parser.add_argument("--only", default="", help="bugs whose name holds this")
    parser.add_argument("--sample", action="store_true", help="one bug for each kernel and layer")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="check", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        mutation = next(m for m in MUTATIONS if m.name == arguments.one)
        print(json.dumps(find(mutation, arguments.launches, arguments.mode)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.launches or Path(scratch)
        if arguments.tests:
            record(arguments.tests, folder)
        wanted = [m for m in MUTATIONS if arguments.only in m.name]
        if arguments.sample:
            wanted = list({(m.kernel, m.found_by): m for m in reversed(wanted)}.values())
        for prefix in sorted({m.kernel for m in wanted}):
            write_baseline(prefix, folder)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda m: result_of(m, folder), wanted)
            return report(wanted, results)


def report(wanted: list[Mutation], results: Iterable[dict[str, list[str]]]) -> int:
    missed = 0
    for m, found in zip(wanted, results, strict=True):
        ok = m.found_by in found
        missed += not ok
        kinds = sorted({line.split(":", 1)[0] for line in found.get("checker", [])})
        layers = ", ".join(f"{layer} ({', '.join(kinds)})" if layer == "checker" else layer for layer in found)
        print(f"{m.name:58} {layers or 'NOT FOUND'}{'' if ok else f'   expected: {m.found_by}'}", flush=True)
    print(f"{len(wanted)} bugs, {missed} not found by the layer that has to")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
