"""Bugs to seed in the project's own kernels, one at a time, and which layer of checks has to find each.

Layers: lint, translator, static (address spaces and types), compiler, checker (with undefined behaviour), numbers (the
outputs differ from those of the kernels as they are, which tests/metal/*.cpp hold against the float64 reference), asan.
"""

from __future__ import annotations

from dataclasses import dataclass

B = "threadgroup_barrier(mem_flags::mem_threadgroup);"
S = "simdgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # of src/metal that is changed
    old: str
    new: str
    found_by: str  # the layer that must find it; others may too
    nth: int = 1  # which occurrence of `old`
    kernel: str = ""  # prefix of the kernels that are run; every bug names one


def seal(name: str, old: str, new: str, found_by: str, nth: int = 1, file: str = "seal.h") -> Mutation:
    return Mutation("seal: " + name, file, old, new, found_by, nth, "kv4_seal")


def dequantise(name: str, old: str, new: str, found_by: str, nth: int = 1) -> Mutation:
    return Mutation("dequantise: " + name, "seal.h", old, new, found_by, nth, "kv4_dequantise")


def prepare(name: str, old: str, new: str, found_by: str, nth: int = 1) -> Mutation:
    return Mutation("prepare: " + name, "rotate.h", old, new, found_by, nth, "kv4_prepare")


def butterfly(name: str, old: str, new: str, found_by: str, nth: int = 1) -> Mutation:
    return Mutation("butterfly: " + name, "butterfly.h", old, new, found_by, nth, "kv4_prepare")


def attend(name: str, old: str, new: str, found_by: str, nth: int = 1, file: str = "attend.h") -> Mutation:
    return Mutation("attend: " + name, file, old, new, found_by, nth, "kv4_attend")


def merge(name: str, old: str, new: str, found_by: str, nth: int = 1, file: str = "merge.h") -> Mutation:
    return Mutation("merge: " + name, file, old, new, found_by, nth, "kv4_merge")


MUTATIONS = [
    # synchronisation: only the checker can be relied on
    seal("barrier removed between reading and writing a tile", B, "", "checker"),
    seal("barrier of no memory before packing", B, "threadgroup_barrier(mem_flags::mem_none);", "checker", 6),
    seal("scale written by all lanes", "if (lane == 0)", "", "checker"),
    dequantise("barrier removed before the rotation", B, "", "checker", 8),
    dequantise(
        "threads beyond the channels return early", "if (tid < dim) {", "if (tid >= dim) return; {", "checker", 3
    ),
    prepare("barrier removed between parts and their sum", B, "", "checker"),
    butterfly("stage of the FFT without a barrier", S, "", "checker"),
    butterfly("split of the spectrum by every SIMD-group", "if (tid < kLanes) {", "{", "checker"),
    prepare("parts of a channel share a slot", "partial[tid] = sum;", "partial[c] = sum;", "checker"),
    attend("weights overwritten before they are read", S, "", "checker"),
    attend("weights read before they are written", S, "", "checker", 2),
    attend("barrier inside a branch", "        }\n    }\n    " + B, "        }\n    " + B + "\n    }", "checker"),
    attend("all SIMD-groups add to the output at once", "if (g == group) {", "{", "checker"),
    attend("every lane writes the maximum", "if (lane == 0) {", "{", "checker"),
    attend(
        "simd_max in a divergent branch",
        "const float top = simd_max(max(s[r].x, s[r].y));",
        "float top = max(s[r].x, s[r].y); if (lane < 16) top = simd_max(top);",
        "checker",
    ),
    attend("barrier of the wrong memory", B, "threadgroup_barrier(mem_flags::mem_device);", "checker"),
    # memory
    seal(
        "codes too short",
        "uchar codes[kv4::apple::kTile * kv4::apple::kMaxDim]",
        "uchar codes[kv4::apple::kTile * 32]",
        "checker",
        file="seal.metal",
    ),
    seal(
        "words stored at odd bytes",
        "(to + key_byte(first + r, channel))",
        "(to + key_byte(first + r, channel) + 1)",
        "checker",
    ),
    seal(
        "writes its input",
        "float squares = 0.0f, largest = 0.0f;",
        "float squares = 0.0f, largest = 0.0f; if (lane == 0) ((device uchar*)a.skip)[0] = 0;",
        "checker",
    ),
    seal("last token of a tile not packed", "i < count * words;", "i + words < count * words;", "numbers"),
    attend(
        "table entry beyond its copies",
        "(threadgroup const float4*)q, key_table + copy",
        "(threadgroup const float4*)q, key_table + 4 * lane",
        "checker",
    ),
    attend("row of the output too long", "if (pair >= uint(D / 2)) continue;", "", "checker"),
    attend(
        "threadgroup memory above 32 KiB",
        "half2 key_table[kv4::apple::kTableSize]",
        "half2 key_table[kv4::apple::kTableSize * 7]",
        "checker",
        file="attend.metal",
    ),
    attend(
        "query rows left uninitialised",
        "share[i] = i < held ? from[i] : 0.0f;",
        "if (i < 8) share[i] = from[i];",
        "checker",
    ),
    attend("reads rows behind the last", "min(int(2 * lane), tokens - 1)", "int(2 * lane)", "checker"),
    attend(
        "private scores overrun",
        "for (int r = 0; r < R; ++r) s[r] = float2(0.0f);",
        "for (int r = 0; r < R + 1; ++r) s[r] = float2(0.0f);",
        "asan",
    ),
    attend(
        "private state overrun",
        "for (int n = 0; n < Pairs<D>::count; ++n) state.o[r][n] = float2(0.0f);",
        "for (int n = 0; n < Pairs<D>::count + 1; ++n) state.o[r][n] = float2(0.0f);",
        "checker",
    ),
    attend("shift by 32", ">> (16 * (n % 2))", ">> (32 * (n % 2))", "checker"),
    merge(
        "lanes and index swapped",
        "uint lane [[thread_index_in_simdgroup]]) {\n  threadgroup float4 x",
        "uint lane [[thread_index_in_threadgroup]]) {\n  threadgroup float4 x",
        "numbers",
        file="attend.metal",
    ),
    # arithmetic: only numbers differ
    seal("nibbles in reverse", "<< (4 * n)", "<< (4 * (7 - n))", "numbers"),
    seal(
        "six thresholds of seven", "for (int i = 0; i < 7; ++i) index", "for (int i = 0; i < 6; ++i) index", "numbers"
    ),
    seal(
        "negative codes off by one",
        "int(a.side[kv4_side_negative_base]) - index",
        "int(a.side[kv4_side_negative_base]) - index - 1",
        "numbers",
    ),
    seal("hidden rows are sealed", "long(row) < part.hidden || ", "", "numbers"),
    dequantise("nibbles swapped", "(tid % 2 * 4)", "(4 - tid % 2 * 4)", "numbers"),
    dequantise("lambda multiplied", "y[tid] / weight", "y[tid] * weight", "numbers"),
    prepare(
        "heads of a group all read the first",
        "long(head * group + g)",
        "long(head * group)",
        "numbers",
    ),
    prepare("input of the sequence's own number", "s[kv4_sequence_input] * call", "long(b) * call", "numbers"),
    butterfly("twiddle of the stage before", "(D / (Radix * Span))", "(D / (Radix * Span)) / 2", "numbers"),
    butterfly(
        "spectrum not conjugated",
        "y[kHalf - k] = conjugate(plus_i(a, turned));",
        "y[kHalf - k] = plus_i(a, turned);",
        "numbers",
    ),
    prepare("one part of the sum lost", "k < kParts;", "k + 1 < kParts;", "numbers"),
    attend("output not rescaled", "for (int n = 0; n < Pairs<D>::count; ++n) state.o[r][n] *= shrink;", "", "numbers"),
    attend("sum not rescaled", "state.l[r] *= shrink;", "", "numbers"),
    attend("tokens behind the last are seen", "j >= tokens || row", "row", "numbers"),
    attend("hidden tokens are seen", "j < hidden || j >= tokens || row", "j >= tokens || row", "numbers"),
    attend(
        "every page is its chunk's first",
        "id & ((long(1) << shift) - 1)",
        "id & 0",
        "numbers",
        file="device.h",
    ),
    attend("rows of the first block alone", "a.ids[ids + row / long(kPageTokens)]", "a.ids[ids]", "numbers"),
    attend("window one token short", "query - block.window + 1", "query - block.window + 2", "numbers"),
    attend(
        "a query does not see its own key", "(block.causal && at > query)", "(block.causal && at >= query)", "numbers"
    ),
    attend(
        "levels of a pair swapped",
        "half2(half(levels[n & 15u]), half(levels[n >> 4]))",
        "half2(half(levels[n >> 4]), half(levels[n & 15u]))",
        "numbers",
    ),
    attend("tokens of a lane swapped", "(n < 2 ? w.z : w.w)", "(n < 2 ? w.w : w.z)", "numbers"),
    attend("page mean added without the sum", "score[r] += simd_sum(part[r]);", "score[r] += part[r];", "numbers"),
    attend("additive mask in the wrong unit", "score + added * kLog2e", "score + added", "numbers"),
    merge("rows from the input's first on", "(sequence[kv4_sequence_input_row] + long(t))", "long(t)", "numbers"),
    merge("maximum of one lane", "top = simd_max(top);", "", "numbers"),
    merge("exact rows rotated too", "if (s < exact_splits) exact += value;\n        else packed", "packed", "numbers"),
    # what a front end would say
    attend("device pointer into threadgroup memory", "threadgroup float* own = p", "device float* own = p", "static"),
    attend(
        "pointer without an address space",
        "device const long* s = a.sequences",
        "const long* s = a.sequences",
        "static",
    ),
    attend(
        "cast between address spaces",
        "(threadgroup const float4*)q, key_table",
        "(device const float4*)q, key_table",
        "static",
    ),
    attend(
        "write through a const pointer", "  Block out;", "  ((device const long*)s)[0] = 0;\n  Block out;", "static"
    ),
    attend(
        "float2 of three components",
        "float2(x * scale.x, y * scale.y)",
        "float2(x * scale.x, y * scale.y, 0.0f)",
        "static",
    ),
    attend(
        "implicit conversion of a vector",
        "const float2 scale = float2(stored);",
        "const float2 scale = stored;",
        "static",
    ),
    attend(
        "C cast of a vector",
        "const float2 scale = float2(stored);",
        "const float2 scale = (float2)stored;",
        "translator",
    ),
    attend(
        "threadgroup memory in a helper", "  Block out;", "  threadgroup float scratch[4];\n  Block out;", "translator"
    ),
    attend("two buffers of one index", "[[buffer(10)]]", "[[buffer(9)]]", "translator", file="attend.metal"),
    attend(
        "unknown attribute",
        "uint tid [[thread_index_in_threadgroup]]",
        "uint tid [[thread_index_in_quadgroup]]",
        "translator",
        file="attend.metal",
    ),
    merge("literal without suffix", "0.69314718055994531f", "0.69314718055994531", "lint"),
    attend(
        "buffer index leaves a gap",
        "device float* states [[buffer(10)]]",
        "device float* states [[buffer(11)]]",
        "lint",
        file="attend.metal",
    ),
]
