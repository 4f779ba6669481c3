"""What the kernels cost in emulation, kv4_attend per cached token, kv4_prepare and kv4_merge per query row: bytes by
the checker, lane-instructions by the counter.

Per token both are differences of two launches in the same splits, one over twice the pages of the other, over the
tokens added: what a call costs once is left out.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from emulator import Module, Output, build
from emulator.count import count_run

SOURCES = Path(__file__).resolve().parents[2] / "src" / "metal"
PAGE = 64
PLACE = 4.0  # bytes of a page's id
NONE = -(1 << 62)  # KV4_NONE


@cache
def enums() -> dict[str, int]:
    """The constants of arguments.h."""
    values: dict[str, int] = {}
    text = re.sub(r"//[^\n]*", "", (SOURCES / "arguments.h").read_text())
    values.update((name, int(n)) for name, n in re.findall(r"#define (KV4_\w+) (\d+)", text))
    for body in re.findall(r"enum \w+ \{(.*?)\}", text, re.S):
        next_value = 0
        for entry in filter(None, (e.strip() for e in body.split(","))):
            name, _, given = (part.strip() for part in entry.partition("="))
            if given:
                next_value = sum(values[t] if t in values else int(t) for t in given.replace(" ", "").split("+"))
            values[name] = next_value
            next_value += 1
    return values


def call_table(page_bytes: int = 0) -> np.ndarray:
    """A call's table of zeros but for pages in one array."""
    e = enums()
    call = np.zeros(e["kv4_call_pages"] + e["kv4_pages_chunks"] + 1, np.int64)
    call[e["kv4_call_pages"] + e["kv4_pages_page_stride"]] = page_bytes
    call[e["kv4_call_pages"] + e["kv4_pages_chunk_shift"]] = e["KV4_ONE_CHUNK"]
    return call


def source(dim: int, rows: int, folder: Path) -> Path:
    """attend.metal with one instantiation."""
    wanted = f'"kv4_attend_d{dim}_r{rows}"'
    lines = (SOURCES / "attend.metal").read_text().splitlines(keepends=True)
    path = folder / f"attend_d{dim}_r{rows}.metal"
    path.write_text("".join(x for x in lines if not x.startswith("template [[host_name") or wanted in x))
    return path


@dataclass
class Launch:
    """A launch over sequences of `pages` whole pages, or over `exact` rows of 16-bit floats, for one KV head."""

    dim: int
    rows: int
    pages: int = 0
    exact: int = 0
    splits: int = 2

    def arguments(self, seed: int = 1) -> list:
        e, d, rng = enums(), self.dim, np.random.default_rng(seed)
        code, scales, mean = PAGE * d // 2, PAGE * 2, d * 2
        at = {"k_scales": code, "k_mean": code + scales, "v_codes": -(-(code + scales + mean) // 16) * 16}
        at["v_scales"] = at["v_codes"] + code
        head_bytes = -(-(at["v_scales"] + scales) // 64) * 64
        pool = rng.integers(0, 256, (max(self.pages, 1), head_bytes), dtype=np.uint8)
        for offset, count in [(at["k_scales"], PAGE), (at["k_mean"], d), (at["v_scales"], PAGE)]:
            pool[:, offset : offset + 2 * count] = np.full(count, 0.01, np.float16).view(np.uint8)
        call = call_table(head_bytes)
        fields = {"dim": d, "kv_heads": 1, "group": self.rows, "queries": 1, "block_rows": self.rows, "blocks": 1,
                  "exact_splits": self.splits if self.exact else 1, "page_splits": self.splits if self.pages else 0,
                  "has_mean": 1, "exact_dtype": 1, "causal": 1, "batch": 1, "key_rotated": 1, "value_rotated": 1,
                  **at}  # fmt: skip
        for name, value in fields.items():
            call[e[f"kv4_call_{name}"]] = value
        sequence = np.zeros(e["kv4_sequence_fields"], np.int64)
        tokens = self.pages * PAGE + self.exact
        window = e["kv4_sequence_exact"] + e["kv4_exact_fields"]
        numbers = {e["kv4_sequence_query_position"]: tokens - 1, e["kv4_sequence_page_count"]: self.pages,
                   e["kv4_sequence_last_page_tokens"]: PAGE, e["kv4_sequence_start"]: -(1 << 62),
                   e["kv4_sequence_queries"]: 1, e["kv4_sequence_lambda_k"]: NONE, e["kv4_sequence_lambda_v"]: NONE,
                   window + e["kv4_exact_position"]: self.pages * PAGE, window + e["kv4_exact_count"]: self.exact,
                   window + e["kv4_exact_ids"]: -1, window + e["kv4_exact_k_stride"]: d,
                   window + e["kv4_exact_v_stride"]: d}  # fmt: skip
        for index, value in numbers.items():
            sequence[index] = value
        splits = int(call[e["kv4_call_exact_splits"]] + call[e["kv4_call_page_splits"]])
        levels = np.array([-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127] * 2, np.int8)
        exact = rng.standard_normal((max(self.exact, 1), d)).astype(np.float16)
        queries = rng.standard_normal((2, self.rows, d)).astype(np.float32) * 0.1
        self.threads = (e["KV4_ATTEND_THREADS"] * splits, 1, 1)
        return [queries, pool, rng.permutation(max(self.pages, 1)).astype(np.int32), exact, exact.copy(),
                np.zeros(16, np.uint8), levels, sequence, call, np.array([0.1, 0.0], np.float32),
                Output(np.zeros(splits * self.rows * (d + 2), np.float32))]  # fmt: skip

    def describe(self) -> dict:
        arguments = self.arguments()
        return {"threads": self.threads, "group": (enums()["KV4_ATTEND_THREADS"], 1, 1), "arguments": arguments}


@dataclass
class Cost:
    """Per cached token of one KV head."""

    bytes: float
    lane_instructions: float
    by_class: dict[str, float]


@cache
def cost(dim: int, rows: int, exact: bool = False) -> Cost:
    kernel = f"kv4_attend_d{dim}_r{rows}"
    few, many = (512, 1024) if exact else (16, 32)
    launches = [Launch(dim, rows, **({"exact": n} if exact else {"pages": n})) for n in (few, many)]
    tokens = (many - few) * (1 if exact else PAGE)
    with tempfile.TemporaryDirectory() as folder:
        path = source(dim, rows, Path(folder))
        checked, counting = (Module(build(path, mode, include=[SOURCES.parent])) for mode in ("check", "count"))
        read = []
        for launch in launches:
            done = checked.run(kernel, **launch.describe())
            if done.findings:
                raise RuntimeError(f"{kernel}: {done.reports}")
            read.append(done.stats.device_read_unique)
        counts = [count_run(counting, kernel, **launch.describe())[1] for launch in launches]
    added = counts[1] - counts[0]
    pages = 0 if exact else many - few
    return Cost(
        (read[1] - read[0] - PLACE * pages) / tokens,
        added.total / tokens,
        {kind: n / tokens for kind, n in added.by_class.items() if n},
    )


@cache
def _counting(file: str, dim: int) -> Module:
    with tempfile.TemporaryDirectory() as folder:
        path = SOURCES / file if file == "rotate.metal" else source(dim, 1, Path(folder))
        return Module(build(path, "count", include=[SOURCES.parent]))


@cache
def _row(kernel: str, file: str, dim: int, splits: int, rotated: int) -> float:
    """Lane-instructions of one query row of float16 with lambda."""
    e = enums()
    call = call_table()
    fields = {"dim": dim, "kv_heads": 1, "group": 1, "queries": 1, "batch": 1, "block_rows": 1, "blocks": 1,
              "q_dtype": 1, "exact_splits": 1, "page_splits": splits - 1, "key_rotated": rotated,
              "value_rotated": rotated, "out_dtype": 1}  # fmt: skip
    for name, value in fields.items():
        call[e[f"kv4_call_{name}"]] = value
    sequence = np.zeros(e["kv4_sequence_fields"], np.int64)  # lambda: the first numbers
    sequence[e["kv4_sequence_queries"]] = 1
    matrix, ones = np.eye(dim, dtype=np.float32), np.ones(dim, np.float32)
    if kernel == "kv4_prepare":
        out = Output(np.zeros(2 * dim, np.float32))
        arguments = [np.ones(dim, np.float16), matrix, ones, sequence, call, np.ones(2, np.float32), out]
    else:
        states = np.ones((splits, dim + 2), np.float32)
        arguments = [states, matrix, ones, ones, sequence, call, Output(np.zeros(dim, np.float16))]
    threads = e["KV4_ROW_THREADS"]
    done, counted = count_run(_counting(file, dim), kernel, threads=threads, group=threads, arguments=arguments)
    if done.result != "ran":
        raise RuntimeError(f"{kernel}: {done.reports}")
    return counted.total


@cache
def row_cost(dim: int, splits: int, rotated: int = 2) -> tuple[float, float]:
    """Lane-instructions of kv4_prepare and of kv4_merge for one query row, whose state is in `splits` parts. rotated: 0
    not, 1 by a matrix, 2 by a butterfly (KV4_ROTATED_)."""
    few, many = (_row("kv4_merge", "attend.metal", dim, n, rotated) for n in (2, 4))
    prepare = _row("kv4_prepare", "rotate.metal", dim, 2, rotated)
    return prepare, few + (many - few) / 2 * (splits - 2)
