#!/usr/bin/env python3
"""Checks that the code keeps to its layers and its house rules. One line per finding; status 1 if there is any.

Run without arguments from anywhere inside the repository; a path argument checks another tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 600
MAX_COLUMNS = 120
# Where a macro or a kernel is one line each.
ANY_COLUMNS = ("tests/metal/emulator/shim/", "tests/metal/kernels/")

# For each folder of src/, and the bindings, the folders whose headers it may include besides its own. Listing only
# what lies below keeps dependencies pointing downwards; a new folder has to be placed here first.
LAYERS: dict[str, set[str]] = {
    "include/kv4": set(),
    "src/format": {"kv4"},
    "src/rotation": {"kv4"},
    "src/recipe": {"kv4", "rotation"},
    "src/moments": {"kv4", "format"},
    "src/ledger": {"kv4", "format"},
    "src/blob": {"kv4", "format", "rotation", "backend", "ledger"},
    "src/attention": {"kv4", "format"},
    "src/paged": {"kv4", "format", "backend", "attention"},
    "src/backend": {"kv4", "format", "rotation", "recipe"},
    "src/reference": {"kv4", "format", "rotation", "recipe", "backend"},
    "src/cpu": {"kv4", "format", "rotation", "recipe", "moments", "backend"},
    "src/cuda": {"kv4", "format", "rotation", "recipe", "moments", "backend"},
    "src/metal": {"kv4", "format", "rotation", "recipe", "backend"},
    "src/cache": {"kv4", "format", "rotation", "recipe", "backend", "attention", "ledger", "blob"},
    "src/capi": {"kv4"},
    # The bindings stand on all of it: hosts in Python ask for the policy, tables and figures that hosts in C++ ask for.
    "python/bindings": {"kv4", "recipe", "ledger", "blob", "attention", "backend", "cpu", "metal"},
    # llama.cpp's backend knows kv4's public headers alone.
    "hosts/llama.cpp": {"kv4"},
}
# For each package of python/, the packages that it may import, which stand above it here, and its own modules from the
# bottom up: a module imports what stands before it, at the top of the file or inside a function, for types or for use.
# The package itself (__init__) is the last of its modules.
PYTHON: dict[str, tuple[set[str], str]] = {
    "kv4": (set(), "_core messages arguments extras whole recipe per_layer shared calibration"),
    "kv4.models": ({"kv4"}, "errors progress catalogue tensors parts convert store"),
    "kv4.metal": ({"kv4"}, "host source sequence launch sealing saved cache mps"),
    "kv4.hf": (
        {"kv4", "kv4.metal"},
        # Handles know nothing of layers, layers nothing of attention.
        "device handle ops files layer states report kinds saved cache "
        "gradient mask prefill attention graph calls attach",
    ),
    "kv4.mlx": ({"kv4", "kv4.metal"}, "arrays prefill gpu core handle cache attention speculation attach"),
    "kv4.vllm": ({"kv4", "kv4.models"}, "settings steps lambdas flash backend rows layers v0_26 v0_32 choice"),
    "kv4.bench": (
        {"kv4", "kv4.hf", "kv4.mlx"},
        "text timing memory neighbours llama plot shapes attention seal cuda generate mlx vllm vllm_serve",
    ),
    "kv4.evaluate": (
        {"kv4", "kv4.hf", "kv4.bench"},
        "levels rotations variant trellis fake calibration scores state windows widths rows report plots simulation "
        "sensitivity calibrate layers oscar learn energy quality ablate peers passkey",
    ),
    "kv4.cli": (
        {"kv4", "kv4.models", "kv4.hf", "kv4.bench", "kv4.evaluate"},
        "openmp output usage options common bench_cuda bench_vllm bench demo evaluate ablate chat generate info "
        "models commands",
    ),
}
# Instruction sets that add to another and may use its folder.
EXTENDS = {"amx": ("avx512", "avx512vbmi"), "avx512vbmi": ("avx512",), "avxvnni": ("avx2",), "i8mm": ("neon",)}
SOURCE = {".h", ".hpp", ".inl", ".cpp", ".c", ".cu", ".cuh", ".metal", ".mm"}
CODE = SOURCE | {".py", ".sh", ".cmake"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
INTRINSIC_HEADER = re.compile(r"^(\w*mmintrin|immintrin|x86intrin|arm_\w+|cuda\w*|mma|Metal/.*|metal_\w+)(\.h)?$")
INTRINSIC = re.compile(r"\b(_mm(256|512)?_\w+|__m(128|256|512)[di]?|v\w+q?_(n_|lane_|laneq_)?[sufp](8|16|32|64))\b")
SPEAKS_OR_DIES = re.compile(
    r"\b(f?printf|puts|perror|std::(cout|cerr|clog|abort|exit|terminate|quick_exit)|abort|_?exit|assert|throw)\b(?!\w)"
)
STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//.*|/\*.*?\*/')

# Written apart so that this file passes its own check.
HOSTS = [
    "pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "deb.debian" + ".org",
    "registry.npmjs" + ".org", "crates" + ".io", "proxy.golang" + ".org",
]  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|root|home/\w+|tmp/bash_jobs)/")
OUTSIDE = re.compile(r"\b(DESIGN|CONTRACT|STYLE)" + r"\.md\b|\bissue #\d+")


def files(root: Path) -> list[Path]:
    """Tracked files and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return sorted({root / name for name in listed.split("\0") if name and (root / name).is_file()})


def layer_of(path: str) -> str | None:
    """The key of LAYERS that holds `path`; a folder of src/ that is missing there is returned as it is."""
    for layer in LAYERS:
        if path.startswith(layer + "/"):
            return layer
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "src" and len(parts) > 2 else None


def check_includes(path: str, lines: list[str]) -> Iterator[tuple[int, str]]:
    layer = layer_of(path)
    if layer is None:
        if path.startswith("src/"):
            yield 1, "a source file lies directly in src/; put it into one of its folders"
        return
    if layer not in LAYERS:
        yield 1, f"{layer} has no place in the layers; add it to LAYERS in scripts/check_guidelines.py"
        return
    own = "kv4" if layer == "include/kv4" else layer.split("/")[-1]
    allowed = LAYERS[layer] | {own}
    for number, line in enumerate(lines, start=1):
        match = INCLUDE.match(line)
        if not match:
            continue
        bracket, header = match.groups()
        if INTRINSIC_HEADER.match(header) and not may_use_intrinsics(path):
            yield number, f"<{header}> belongs into the folder of one instruction set or device"
        elif bracket == '"':
            folder = header.split("/")[0] if "/" in header else own
            if folder not in allowed:
                yield number, f'{layer} must not include "{header}" (it may use: {", ".join(sorted(allowed))})'
            elif isa_of(header) and isa_of(header) not in (isa_of(path), *EXTENDS.get(isa_of(path) or "", ())):
                yield number, f'"{header}" is for {isa_of(header)} alone'


def isa_of(path: str) -> str | None:
    """avx2 for (src/)cpu/avx2/..., None for what all instruction sets share."""
    match = re.match(r"(?:src/)?cpu/(\w+)/", path)
    return match.group(1) if match else None


def may_use_intrinsics(path: str) -> bool:
    return (
        isa_of(path) is not None
        or path == "src/cpu/standard_headers.h"
        or path.startswith(("src/cuda/", "src/metal/", "tests/", "bench/"))
    )


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module of `package` imports, wherever it does; `from a import x` names a.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def place_of(name: str) -> tuple[str, str] | None:
    """(package, module) of a dotted name; None for what is not of python/kv4."""
    parts = name.split(".")
    if parts[0] != "kv4":
        return None
    package = ".".join(parts[:2]) if ".".join(parts[:2]) in PYTHON else "kv4"
    module = name.removeprefix(package).lstrip(".").split(".")[0]
    return package, module if module in PYTHON[package][1].split() else "__init__"


def check_imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    *folders, module = path.removeprefix("python/").removesuffix(".py").split("/")
    package = ".".join(folders)
    allowed, listed = PYTHON.get(package, (set(), ""))
    modules = [*listed.split(), "__init__"]
    if package not in PYTHON or module not in modules:
        yield 1, f"{package}.{module} has no place in the layers; add it to PYTHON in scripts/check_guidelines.py"
        return
    below = modules[: modules.index(module)]
    for number, name in imports(ast.parse(text), package):
        there = place_of(name)
        if there is not None and (there[1] not in below if there[0] == package else there[0] not in allowed):
            what = ", ".join([*sorted(allowed), *(f"{package}.{other}" for other in below)])
            yield number, f"{package}.{module} must not import {'.'.join(there)} (it may import: {what})"


def check_core(path: str, lines: list[str]) -> Iterator[tuple[int, str]]:
    """What the library itself never does."""
    for number, line in enumerate(lines, start=1):
        code = STRING_OR_COMMENT.sub(" ", line)
        if found := SPEAKS_OR_DIES.search(code):
            yield number, f"the core never prints, exits, aborts or throws: {found.group(0)}"
        if not may_use_intrinsics(path) and (found := INTRINSIC.search(code)):
            yield number, f"intrinsics belong into src/cpu/<isa>/: {found.group(0)}"
        if path.startswith(("src/cache/", "include/")) and re.search(r"\b(__CUDA\w*|KV4_CUDA|__METAL\w*)\b", code):
            yield number, "device switches belong into a backend"


def check_text(path: str, lines: list[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        for host in HOSTS:
            if host in line:
                yield number, f"names a registry's host: {host}"
        if found := MACHINE_PATH.search(line):
            yield number, f"names a path of one machine: {found.group(0)}"
        if Path(path).suffix in CODE and (found := OUTSIDE.search(line)):
            yield number, f"refers to something outside the repository: {found.group(0)}"


def check_tree(root: Path) -> list[str]:
    findings: list[str] = []
    for file in files(root):
        path = file.relative_to(root).as_posix()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image or the like
        found: list[tuple[int, str]] = list(check_text(path, lines))
        suffix = file.suffix
        if suffix in CODE and len(lines) > MAX_LINES:
            found.append((len(lines), f"{len(lines)} lines; at most {MAX_LINES} are allowed"))
        if (suffix in SOURCE or suffix == ".py") and not path.startswith(ANY_COLUMNS):
            found += [
                (number, f"{len(line)} columns; at most {MAX_COLUMNS} are allowed")
                for number, line in enumerate(lines, start=1)
                if len(line) > MAX_COLUMNS
            ]
        if suffix == ".py" and path.startswith("python/"):
            found += check_imports(path, "\n".join(lines))
        if suffix in SOURCE:
            found += check_includes(path, lines)
            if path.startswith(("src/", "include/")):
                found += check_core(path, lines)
        findings += [f"{path}:{number}: {what}" for number, what in sorted(found)]
    return findings


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else Path(__file__).resolve().parent.parent
    findings = check_tree(root)
    for finding in findings:
        print(finding)
    if not findings:
        print("guideline checks passed")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
