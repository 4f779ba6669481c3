"""LLVM IR with a counter in every basic block, and what each block costs a lane of an Apple GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Operations of a SIMD-group, per lane and 32-bit word. Apple publishes none of these. A reduction is taken as five
# exchanges and five operations; an 8 x 8 x 8 multiplication as its 512 multiply-adds over 32 lanes.
COSTS = {
    "simd_shuffle": 1, "simd_broadcast": 1, "quad_shuffle": 1, "quad_broadcast": 1,
    "simd_sum": 10, "simd_product": 10, "simd_max": 10, "simd_min": 10, "simd_or": 10, "simd_and": 10, "simd_xor": 10,
    "simd_any": 2, "simd_all": 2, "simd_prefix": 10,
    "simdgroup_multiply": 16, "simdgroup_load": 2, "simdgroup_store": 2,
    "threadgroup_barrier": 1, "simdgroup_barrier": 1, "atomic": 1,
}  # fmt: skip
# Functions of one float. exp is exp2 of a product; a quotient is a reciprocal and a product.
FUNCTIONS = {"exp2": 1, "log2": 1, "exp": 2, "log": 2, "sqrt": 1, "sin": 4, "cos": 4, "tanh": 6, "pow": 3, "tan": 8}
FREE = {"fabs", "assume", "lifetime", "dbg", "experimental", "expect", "copysign", "memcpy", "memset", "memmove"}

DEFINE = re.compile(r"^define .*?@([\w.$]+|\"[^\"]+\")\(")
LIBRARY = re.compile(r"_ZNK?3emu|_ZZ|_ZL\d+emu_launch|_GLOBAL|__")  # functions of the stand-in library and the table
LABEL = re.compile(r"^([\w.$-]+|\"[^\"]+\"):")
ASSIGN = re.compile(r"^\s+(%[\w.$-]+|%\"[^\"]+\") = (.*)$")
VECTOR = re.compile(r"<(\d+) x ([\w*]+)>")
VALUE = re.compile(r"%[\w.$-]+")
INTEGER = {"add", "sub", "and", "or", "xor", "shl", "lshr", "ashr"}


@dataclass
class _Block:
    costs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (class, line) -> instructions


def instrument(ir: str) -> tuple[str, list[_Block]]:
    """The IR with counters, and each block's costs."""
    lines, out, blocks = ir.splitlines(), [], []
    places = _Places(lines)
    i = 0
    while i < len(lines):
        match = DEFINE.match(lines[i])
        if not match:
            out.append(lines[i])
            i += 1
            continue
        end = next(j for j in range(i, len(lines)) if lines[j] == "}")
        counted = not LIBRARY.match(match.group(1).strip('"'))
        out.append(lines[i])
        out += _function(lines[i + 1 : end], blocks, places) if counted else lines[i + 1 : end]
        out.append("}")
        i = end + 1
    n = max(len(blocks), 1)
    out.append(f"@emu_counters = hidden global [{n} x i64] zeroinitializer")
    out += ["define ptr @emu_block_counts(ptr %blocks) {", f"  store i64 {len(blocks)}, ptr %blocks"]
    out += ["  ret ptr @emu_counters", "}"]
    return "\n".join(out) + "\n", blocks


def _function(body: list[str], blocks: list[_Block], places: _Places) -> list[str]:
    function = _Function(body)
    out: list[str] = []
    pending = True  # the block that begins here has no counter yet
    block = _Block()
    blocks.append(block)
    for line in body:
        if LABEL.match(line):
            if pending and out:
                raise ValueError(f"LLVM IR: expected instructions before a label; got {line}")
            pending, block = True, _Block()
            blocks.append(block)
            out.append(line)
            continue
        assigned = ASSIGN.match(line)
        value, text = assigned.groups() if assigned else ("", line.strip())
        operation = text.split(" ", 1)[0]
        if pending and line.strip() and operation != "phi":
            n = len(blocks) - 1
            at = f"getelementptr inbounds (i64, ptr @emu_counters, i64 {n})"
            out += [f"  %emu.was.{n} = load i64, ptr {at}", f"  %emu.now.{n} = add i64 %emu.was.{n}, 1"]
            out.append(f"  store i64 %emu.now.{n}, ptr {at}")
            pending = False
        out.append(line)
        kind, cost = function.weight(value, text)
        if cost:
            block.costs[kind, places.of(line)] += cost
    return out


class _Function:
    """Definitions and uses of values, to find instructions that fuse into others."""

    def __init__(self, body: list[str]) -> None:
        self.made: dict[str, str] = {}  # value -> instruction
        self.users: dict[str, list[str]] = {}
        for line in body:
            line = line.split(", !dbg")[0]
            assigned = ASSIGN.match(line)
            text = assigned.group(2) if assigned else line
            if assigned:
                self.made[assigned.group(1)] = text
            for value in VALUE.findall(text):
                self.users.setdefault(value, []).append(text)
        self.fused = {v for v in map(self.fused_product, self.made) if v}

    def fused_product(self, value: str) -> str | None:
        """The product that the addition `value` absorbs."""
        text = self.made[value]
        if not text.startswith(("fadd", "fsub")):
            return None
        for operand in VALUE.findall(text):
            if self.made.get(operand, "").startswith("fmul") and len(self.users.get(operand, [])) == 1:
                return operand
        return None

    def private(self, pointer: str) -> bool:
        text = self.made.get(pointer, "")
        while text.startswith("getelementptr"):
            pointer = next(iter(VALUE.findall(text)), "")
            text = self.made.get(pointer, "")
        return text.startswith("alloca")

    def weight(self, value: str, text: str) -> tuple[str, int]:
        operation = text.split(" ", 1)[0]
        vector = VECTOR.search(text.split(", !dbg")[0])
        n = int(vector.group(1)) if vector else 1
        wide = 2 if re.search(r"\bi64\b", text) else 1
        if operation in ("fadd", "fsub"):
            return "float", n
        if operation == "fmul":
            return "float", 0 if value in self.fused else n
        if operation == "fdiv":
            return "function", n if re.match(r"fdiv [\w ]*?(float|half) 1\.0", text) else 2 * n
        if operation in INTEGER:
            return "integer", n * wide
        if operation == "mul":
            return "multiply", n * wide * wide
        if operation in ("udiv", "sdiv", "urem", "srem"):
            return "divide", n * 20  # there is no such instruction: a sequence of about this length
        if operation in ("icmp", "fcmp"):
            users = self.users.get(value, [])
            return "integer", 0 if users and all(u.startswith("select") for u in users) else n
        if operation == "select":
            return "integer", n
        if operation in ("sitofp", "uitofp", "fptosi", "fptoui", "fpext", "fptrunc", "sext"):
            return "convert", n
        if operation == "getelementptr":
            return "integer", 1 if VALUE.findall(text)[1:] else 0
        if operation in ("load", "store"):
            return self.memory(text, operation, vector)
        if operation in ("br", "switch"):
            return "control", 1 if "," in text.split(", !dbg")[0] else 0
        if operation in ("call", "tail", "notail", "musttail"):
            return self.call(text, n)
        return "", 0

    def memory(self, text: str, operation: str, vector: re.Match[str] | None) -> tuple[str, int]:
        pointer = re.search(r"ptr (%[\w.$-]+|@[\w.$-]+)", text)
        element = (
            vector.group(2) if vector else (re.match(r"(?:load|store)(?: volatile)? (\w+)", text) or ["", "i32"])[1]
        )
        size = {"i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i64": 8, "ptr": 8}.get(element, 4)
        cost = -(-size * (int(vector.group(1)) if vector else 1) // 16)
        return ("private" if pointer and self.private(pointer.group(1)) else "memory"), cost

    def call(self, text: str, n: int) -> tuple[str, int]:
        name = re.search(r"@([\w.$]+)\(", text)
        if not name:
            return "call", 1
        if found := re.match(r"_ZN3emu5names\d+(\w+)", name.group(1)):
            for operation, cost in COSTS.items():
                if found.group(1).startswith(operation):
                    narrow = re.search(r"call [\w ]*?(half|i8|i16|i1|bfloat) @", text) and n == 1
                    return ("matrix" if "simdgroup_m" in operation else "exchange"), cost * (1 if narrow else n)
            return "call", 1
        if "threadgroup_barrier" in name.group(1) or "simdgroup_barrier" in name.group(1):
            return "exchange", 1
        base = re.sub(r"^llvm\.", "", name.group(1)).split(".")[0]
        if base in FREE or name.group(1).startswith("_ZN3emu"):
            return "", 0
        base = base.removesuffix("f") if base.removesuffix("f") in FUNCTIONS else base
        if base in FUNCTIONS:
            return "function", FUNCTIONS[base] * n
        if base in ("fma", "fmuladd", "maxnum", "minnum", "maximum", "minimum"):
            return "float", n
        if base in ("rint", "nearbyint", "floor", "ceil", "trunc", "round", "roundeven"):
            return "float", n
        return "integer", n  # smax, umin, ctpop, fshl, bswap and their like


class _Places:
    """Source lines from debug metadata: the innermost frame that is not in the stand-in library."""

    def __init__(self, lines: list[str]) -> None:
        self.nodes = {
            m.group(1): m.group(2) for line in lines if (m := re.match(r"^(!\d+) = (?:distinct )?(!DI.*)$", line))
        }
        self.known: dict[str, str] = {}

    def field(self, node: str, name: str) -> str:
        found = re.search(rf"\b{name}: (!?[\w\"./-]+)", self.nodes.get(node, ""))
        return found.group(1) if found else ""

    def file(self, scope: str) -> str:
        while scope and not self.field(scope, "file"):
            scope = self.field(scope, "scope")
        return self.field(self.field(scope, "file"), "filename").strip('"')

    def of(self, line: str) -> str:
        found = re.search(r"!dbg (!\d+)", line)
        return self.place(found.group(1)) if found else "?"

    def place(self, node: str) -> str:
        if node not in self.known:
            file = self.file(self.field(node, "scope"))
            outer = self.field(node, "inlinedAt")
            name = f"{Path(file).name}:{self.field(node, 'line')}"
            self.known[node] = self.place(outer) if "shim/" in file and outer else name
        return self.known[node]
