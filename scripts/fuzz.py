#!/usr/bin/env python3
"""Runs the fuzz targets of a build with libFuzzer (CMake preset `fuzz`), says how many inputs each tried, and keeps
what crashed. Status 1 if anything did.

    scripts/fuzz.py [--build build/fuzz] [--seconds 30] [--jobs N] [--seed N] [TARGET...]

`--seconds` is for each target. Crashes lie in BUILD/crashes/TARGET; grown corpora in BUILD/corpus/TARGET, and
`--merge` keeps of them in fuzz/corpus what covers code that nothing there does.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "fuzz" / "corpus"
# Limits of input length, and of memory per allocation and in all: exceeding them because an input says so is a finding.
LIMITS = {"saved_cache": 65536, "c_program": 128, "paged": 1024, "calibration": 4096}
MEMORY = ("-malloc_limit_mb=256", "-rss_limit_mb=2048")
COUNT = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


@dataclass
class Run:
    target: str
    inputs: int
    edges: int
    seconds: float
    crashes: list[Path]
    output: str
    ok: bool


def program(build: Path, target: str) -> Path:
    return build / "fuzz" / f"kv4_fuzz_{target}"


def run(build: Path, target: str, seconds: int, seed: int) -> Run:
    crashes, grown = build / "crashes" / target, build / "corpus" / target
    for folder in (crashes, grown):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    began = time.monotonic()
    done = subprocess.run(
        [
            program(build, target), f"-max_total_time={seconds}", f"-max_len={LIMITS[target]}", f"-seed={seed}",
            "-timeout=120", "-print_final_stats=1", "-len_control=0", *MEMORY, f"-artifact_prefix={crashes}/",
            grown, CORPUS / target,
        ],
        capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )  # fmt: skip
    count, covered = COUNT.search(done.stderr), COVERAGE.findall(done.stderr)
    return Run(
        target=target,
        inputs=int(count.group(1)) if count else 0,
        edges=int(covered[-1][0]) if covered else 0,
        seconds=time.monotonic() - began,
        crashes=sorted(set(crashes.iterdir()) - before),
        output=done.stderr,
        ok=done.returncode == 0,
    )


def merge(build: Path, target: str) -> None:
    """Merges grown inputs that cover new code into the repository's corpus, shortest first."""
    subprocess.run(
        [program(build, target), "-merge=1", f"-max_len={LIMITS[target]}", CORPUS / target, build / "corpus" / target],
        check=True, capture_output=True,
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--merge", action="store_true", help="keep what covers something new in fuzz/corpus")
    parser.add_argument("targets", nargs="*")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.targets) - set(LIMITS))
    if unknown:
        parser.error(f"TARGET: expected some of {', '.join(LIMITS)}; got {', '.join(unknown)}")
    targets = [name for name in given.targets or LIMITS if program(given.build, name).is_file()]
    if not targets:
        parser.error(f"--build: expected a folder with fuzz targets (cmake --preset fuzz); got {given.build}")
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = list(pool.map(lambda name: run(given.build, name, given.seconds, given.seed), targets))
    for each in runs:
        print(f"{each.target}: {each.inputs:,} inputs in {each.seconds:.0f} s, {each.edges:,} edges covered")
        if not each.ok:
            print(each.output[-6000:])
            print(f"{each.target}: failed (seed {given.seed}); inputs: {', '.join(map(str, each.crashes)) or 'none'}")
    if given.merge:
        for name in targets:
            merge(given.build, name)
    return 0 if all(each.ok and each.inputs > 0 for each in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
