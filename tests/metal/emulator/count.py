"""Counts lane-instructions: what one lane of the compiled kernel executes, by class, over a real launch.

clang compiles the kernel for one lane to LLVM IR with -O2 and Metal's default fast math; every basic block gets a
counter, and the emulator runs it. An instruction of the IR weighs what the scalar instruction set of an Apple GPU
would need for it, as far as public knowledge goes (COSTS, `weight` of instructions.py): vectors cost one instruction a
component, a multiplication that feeds one addition is part of it, a comparison that feeds a select is part of that,
moves between components and widenings are free. It counts the source after optimisation, not the
code of Apple's compiler, which is not published.

    done, counts = lane_instructions(path, "attend", threads=..., group=..., arguments=[...])
    counts.total / lanes, counts.by_class["float"], counts.by_line["attend.metal:120"]

The cost of one more key is the difference of two launches that differ by keys, over their number.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .build import build
from .module import Module, Run


@dataclass
class Counts:
    by_class: Counter[str] = field(default_factory=Counter)  # float, integer, convert, function, memory, private, ...
    by_line: Counter[str] = field(default_factory=Counter)  # "file.metal:line" -> lane-instructions

    @property
    def total(self) -> int:
        return sum(self.by_class.values())

    def __sub__(self, other: Counts) -> Counts:
        result = Counts(Counter(self.by_class), Counter(self.by_line))
        result.by_class.subtract(other.by_class)
        result.by_line.subtract(other.by_line)
        return result


def lane_instructions(source: str | Path, kernel: str, **launch) -> tuple[Run, Counts]:
    """Runs `kernel` of `source` as Module.run does; its Run, and its Counts summed over all lanes."""
    path = build(source, "count", include=launch.pop("include", ()), define=launch.pop("define", ()))
    return count_run(Module(path), kernel, **launch)


def count_run(module: Module, kernel: str, **launch) -> tuple[Run, Counts]:
    """As lane_instructions, with a module built with "count"."""
    described = json.loads(module.path.with_suffix(".blocks").read_text())
    blocks = ctypes.c_size_t()
    function = module.library.emu_block_counts
    function.restype = ctypes.POINTER(ctypes.c_uint64)
    counters = function(ctypes.byref(blocks))
    for i in range(blocks.value):
        counters[i] = 0
    done = module.run(kernel, **launch)
    counts = Counts()
    for i, costs in enumerate(described):
        for kind, line, n in costs:
            counts.by_class[kind] += n * counters[i]
            counts.by_line[line] += n * counters[i]
    return done, counts
