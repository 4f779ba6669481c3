"""What stops a kernel before it runs, and at which line; the rules of PyTorch and MLX; MLX's generated signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emulator import MetalError, Module, Output, build, check_spaces, load
from emulator.count import count_run
from emulator.lint import lint, lint_language, lint_mlx, lint_torch
from emulator.mlx import PRELUDE, arguments, kernel_text
from emulator.source import tokenise

OUT = "device float* out [[buffer(0)]]"
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
METAL = Path(__file__).resolve().parents[2] / "src" / "metal"


def translated(tmp_path: Path, text: str):
    path = tmp_path / "case.metal"
    path.write_text(HEAD + text)
    return load(path)[1]


def body(text: str, parameters: str = OUT) -> str:
    return f"kernel void k({parameters}) {{\n{text}\n}}\n"


REFUSED = {
    body("threadgroup float a[4], b[4];"): "case.metal:4: threadgroup",
    "inline void f() {\nthreadgroup float a[4];\n}\n"
    + body(""): "case.metal:4: threadgroup memory: expected its declaration in",
    body("threadgroup float a = 1.0f;"): "case.metal:4: threadgroup: expected a pointer",
    body("float4 v = (float4)out[0];"): "case.metal:4: conversion: expected float4(...); got a cast",
    body(
        "float4 v = static_cast<float4>(out[0]);"
    ): "case.metal:4: conversion: expected float4(...); got a static_cast",
    body("", OUT + ", device float* x [[buffer(0)]]"): "case.metal:3: k: parameter x: expected a buffer",
    body("", "float* out [[buffer(0)]]"): "case.metal:3: k: parameter out: expected device or constant memory",
    body("", OUT + ", uint i [[thread_index_in_quadgroup]]"): "case.metal:3: k: parameter i: expected",
    body("", "device float* out [[texture(0)]]"): "case.metal:3: k: parameter out: expected an attribute",
    "template <typename T>\n"
    + body("", "device T* out [[buffer(0)]]"): "case.metal:4: kernel k: expected an instantiation",
    "kernel float k(device float* out) { return 0.0f; }\n": "case.metal:3: kernel: expected void",
    'template [[host_name("x")]] kernel void absent<float>(device float*);\n': "case.metal:3: instantiation: expected",
    "struct S { float x [[attribute(0)]]; };\n"
    + body(""): "case.metal:3: attribute: expected one that the emulator knows",
    body("\n").replace("}", ""): "case.metal:3: expected the end of what { opens",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refusals_name_the_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(MetalError) as error:
        translated(tmp_path, text)
    assert REFUSED[text] in str(error.value) and error.value.stage == "translator"


STATIC = {
    body("threadgroup float a[4]; device float* p = a;"): "case.metal:4: error: cannot initialize",
    body("float* p = out;"): "case.metal:4: error: cannot initialize",
    body("half4 h = half4(0.0h); float4 v = h;"): "case.metal:4: error: cannot initialize",
    body("float4 v = float4(out[0], out[1], out[2]);"): "vector constructor: wrong number of components",
    body("n = 1;", OUT + ", constant long& n [[buffer(1)]]"): "case.metal:4: error: cannot assign",
    body("auto [a, b] = out[0];"): "case.metal:4: error",  # C++17
    body("if constexpr (true) out[0] = 0.0f;"): "case.metal:4: error: constexpr if is a C++17 extension",
    body("float x = sqrt(out[0]) + exp(1);"): "expected float or half",
    body("simdgroup_half8x8 a; simdgroup_load(a, out, 8);"): "case.metal:4: error: no matching function",
    body("float x; if (out[0] > 0.0f) x = 1.0f; out[1] = x;"): "case.metal:4: error: variable 'x'",
}


@pytest.mark.parametrize("text", STATIC)
def test_the_static_pass_and_the_compiler_name_the_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.metal"
    path.write_text(HEAD + text)
    with pytest.raises(MetalError) as error:
        build(path, "fast")
    assert STATIC[text] in str(error.value) and error.value.stage in ("static", "compiler")


LINTED = {
    body("out[0] = 1.0;"): "case.metal:4: 1.0: expected a suffix",
    body("out[0] = 1e-3 + 2.0f;"): "case.metal:4: 1e-3: expected a suffix",
    body("double d = 1.0f;"): "case.metal:4: double: MSL has no double",
    body("auto f = [](float x) { return x; };"): "case.metal:4: MSL has no lambda",
    body(
        "", OUT + ", uint i [[thread_position_in_grid]], uint3 n [[threads_per_grid]]"
    ): "case.metal:3: k: expected positions",
    body("goto end; end: out[0] = 0.0f;"): "case.metal:4: goto",
    "inline float f(const float* x) { return x[0]; }\n"
    + body(""): "case.metal:3: const float * x: expected an address space",
    "struct P { int n; };\n"
    + body("", OUT + ", constant P& p [[buffer(1)]]"): "case.metal:4: torch: k: p: expected long, float or bool; got P",
    body("", "device float* out [[buffer(1)]], device float* x [[buffer(0)]]"): "torch: k: out: expected buffer 0",
    body("", OUT + ", constant int& n [[buffer(1)]]"): "torch: k: n: expected long, float or bool; got int",
    body("", OUT + ", threadgroup float* t [[threadgroup(0)]]"): "torch: k: t: expected threadgroup memory",
    "constant bool kFlag [[function_constant(0)]];\n" + body(""): "torch: expected no function constants",
    body(
        "", "device const float4* x [[buffer(0)]], device float* out [[buffer(1)]]"
    ): "mlx: k: x: expected an array's type; got float4",
    body("", "device const float* x [[buffer(0)]]"): "mlx: k: expected an output",
    body(
        "", ", ".join(f"device float* b{i} [[buffer({i})]]" for i in range(32))
    ): "torch: k: expected at most 31 buffers; got 32",
}


@pytest.mark.parametrize("text", LINTED)
def test_lint_names_the_line(tmp_path: Path, text: str) -> None:
    found = lint(translated(tmp_path, text))
    assert any(LINTED[text] in line for line in found), found


def test_lint_passes_what_both_hosts_accept(tmp_path: Path) -> None:
    good = body(
        "threadgroup float t[4];\nt[0] = x[i] * 0x1f + 2.0e-3f + 1.0h;\nout[i] = t[0] * float(n);",
        "device const float* x [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]], "
        "uint i [[thread_position_in_grid]]",
    )
    assert lint(translated(tmp_path, good)) == []


@pytest.mark.parametrize("path", sorted(METAL.glob("*.metal")), ids=lambda p: p.name)
def test_the_projects_kernels_keep_the_rules(path: Path) -> None:
    _, translation = load(path)
    assert lint_language(translation) == []
    assert lint_torch(translation) == []
    assert lint_mlx(translation) == []
    assert check_spaces(translation) == ""


def test_lines_and_tokens_stay_where_they_are() -> None:
    tokens = tokenise('# 7 "a.h"\nint x;\n# 3 "b.metal"\nfloat y = 1.0e-3f; // no comment is left by then\n', "b.metal")
    named = {t.text: (t.file, t.line) for t in tokens}
    assert named["x"] == ("a.h", 7) and named["y"] == ("b.metal", 3) and "1.0e-3f" in named


def test_only_builds_the_named_instances(tmp_path: Path) -> None:
    text = "template <typename T> kernel void k(device T* out [[buffer(0)]]) { out[0] = T(1); }\n" + "".join(
        f'template [[host_name("k_{t}")]] kernel void k<{t}>(device {t}*);\n' for t in ("float", "half", "int")
    )
    path = tmp_path / "case.metal"
    path.write_text(HEAD + text)
    assert sorted(Module(build(path, "fast")).kernels) == ["k_float", "k_half", "k_int"]
    assert sorted(Module(build(path, "fast", only=["k_half"])).kernels) == ["k_half"]


MLX_BODY = """
  threadgroup float scale[1];
  if (thread_index_in_threadgroup == 0) scale[0] = factor * few[2];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint i = thread_position_in_grid.x;
  if (i < uint(x_shape[0])) out[i] = T(scale[0] * float(x[i]) + N + x_ndim + int(x_strides[0]));
"""


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_mlx_body_runs_in_the_signature_mlx_writes(tmp_path: Path, mode: str) -> None:
    x = np.arange(40, dtype=np.float16)
    inputs = [("x", x), ("few", np.array([1, 2, 3], np.float32)), ("factor", np.array(0.5, np.float32))]
    out = np.zeros(40, np.float32)
    text = kernel_text("scale", inputs, [("out", out)], MLX_BODY, template=[("T", "float"), ("N", 2)])
    assert (
        "const constant float* few" in text
        and "const constant float& factor" in text
        and "const device float16_t* x" in text
    )
    path = tmp_path / "scale.metal"
    path.write_text(PRELUDE + text)
    done = Module(build(path, mode)).run("scale", 64, 32, arguments(inputs, [Output(out)], MLX_BODY))
    assert done.result == "ran" and not done.reports
    assert np.allclose(out, 1.5 * np.arange(40) + 2 + 1 + 1)


COUNTED = """
kernel void fused(device const float* x [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                  uint i [[thread_position_in_grid]]) {
  float sum = 0.0f;
  for (long k = 0; k < n; ++k) sum = x[k] * sum + 1.5f;
  out[i] = sum;
}
kernel void summed(device const float* x [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                   uint i [[thread_position_in_grid]]) {
  float sum = 0.0f;
  const long count = n;
  for (long k = 0; k < count; ++k) sum = simd_sum(sum + x[k]);
  out[i] = sum;
}
"""


def test_lane_instructions_of_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "count.metal"
    path.write_text(HEAD + COUNTED)
    module = Module(build(path, "count"))
    x, out = np.zeros(256, np.float32), np.zeros(32, np.float32)

    def counts(kernel: str, n: int):
        done, found = count_run(module, kernel, threads=32, group=32, arguments=[x, Output(out), n])
        assert done.result == "ran"
        return found

    loop = counts("fused", 256) - counts("fused", 128)
    per = {kind: n / (128 * 32) for kind, n in loop.by_class.items() if n}
    assert per["float"] == 1  # the product is part of the sum
    assert per["memory"] == 1 and "private" not in per and "exchange" not in per
    assert loop.by_line["count.metal:7"] == loop.total
    summed = counts("summed", 256) - counts("summed", 128)
    per = {kind: n / (128 * 32) for kind, n in summed.by_class.items() if n}
    assert per["exchange"] == 10 and per["float"] == 1 and per["memory"] == 1
