"""Compiles a .metal file into a module: one shared library that holds its kernels and the runtime.

Ways of building ("modes"):

    fast      IEEE arithmetic, nothing checked: for numbers, and long contexts
    fastmath  as Metal compiles by default: reassociation, contraction, no NaN or infinity
    check     every access checked: races, bounds, uninitialised bytes, alignment; undefined behaviour; byte counts
    asan      AddressSanitizer, for private memory too. The process needs its library preloaded: asan_environment()
    count     lane-instructions; see count.py

Modules are cached in build/metal/cache of the repository under a hash of their inputs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .instructions import instrument
from .source import HERE, MetalError, preprocess, tokenise
from .translate import Kernel, Translation, translate

REPOSITORY = HERE.parents[2]
INCLUDE = [REPOSITORY / "src", REPOSITORY / "include"]
KEEP_DAYS = 7
MODES = ("fast", "fastmath", "check", "asan", "count")
UNDEFINED = "-fsanitize=undefined,float-cast-overflow -fno-sanitize=vptr,function"

# MSL is C++14; the stand-in library is not, but counts as a system header. Halves round after every operation.
LANGUAGE = shlex.split(
    "-std=c++14 -fno-exceptions -fno-rtti -fno-lax-vector-conversions -Xclang -ffloat16-excess-precision=none "
    "-Xclang -fbfloat16-excess-precision=none -nostdinc++ -Werror=c++17-extensions -Werror=c++20-extensions "
    "-Werror=double-promotion -Werror=uninitialized -Werror=sometimes-uninitialized -Werror=return-type "
    "-Werror=format -Wno-user-defined-literals -Wno-duplicate-decl-specifier -Wno-psabi -Wno-unused-value"
)
KERNEL_FLAGS = {
    "fast": "-O2 -ffp-contract=off",
    "fastmath": "-O2 -ffast-math",
    # By default the instrumentation skips a read that is followed by a write to the same address.
    "check": f"-O1 -ffp-contract=off -fsanitize=thread -mllvm -tsan-instrument-read-before-write {UNDEFINED} "
    "-ftrivial-auto-var-init=pattern",
    "asan": "-O1 -ffp-contract=off -fsanitize=address -fsanitize-recover=address -fno-omit-frame-pointer "
            "-ftrivial-auto-var-init=pattern",
    "count": "-O2 -ffast-math -fno-vectorize -fno-slp-vectorize",
}  # fmt: skip
RUNTIME = ["abi", "bfloat", "memory", "record", "report", "scheduler", "checker"]
EXTRA = {"check": ["hooks", "ubsan"], "asan": ["asan"]}


def compiler() -> str | None:
    """clang++ of version 19 or later; None where there is none. KV4_METAL_CXX names one."""
    if named := os.environ.get("KV4_METAL_CXX"):
        if shutil.which(named) is None:
            raise MetalError(f"KV4_METAL_CXX: expected a clang++ of version 19 or later; got {named}")
        return named
    return next((found for n in range(19, 25) if (found := shutil.which(f"clang++-{n}"))), None)


def _compiler() -> str:
    found = compiler()
    if not found:
        raise MetalError("compiler: expected clang++-19 or later (Debian: clang-19 libclang-rt-19-dev); got none")
    return found


@functools.cache
def asan_library(cxx: str) -> Path | None:
    """AddressSanitizer's shared runtime; None where it is not installed."""
    done = subprocess.run([cxx, "-print-file-name=libclang_rt.asan-x86_64.so"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def asan_environment() -> dict[str, str]:
    """What a process needs in its environment before it loads a module built with "asan"."""
    library = asan_library(_compiler())
    if library is None:
        raise MetalError("asan: expected libclang-rt-19-dev; got no libclang_rt.asan-x86_64.so")
    options = "halt_on_error=0:detect_leaks=0:detect_stack_use_after_return=0:log_path=/dev/null"
    return {"LD_PRELOAD": str(library), "ASAN_OPTIONS": options}


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Half conversions in hardware where this machine has them: they are most of an emulated kernel's time."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    return ("-march=x86-64-v3",) if all(f" {f}" in flags for f in ("avx2", "f16c", "fma", "bmi2")) else ()


def run_tool(command: Sequence[str], stage: str = "compiler") -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = MetalError(_errors(done.stderr))
        error.stage = stage
        raise error
    return done.stderr


def _errors(text: str) -> str:
    """The error lines alone, with paths cut to file names; all of it where none is marked."""
    lines = [re.sub(r"(?:[^\s:]*/)?([^/\s:]+\.\w+):(\d+):\d+: ", r"\1:\2: ", line)
             for line in text.splitlines() if ": error:" in line or ": fatal error:" in line]  # fmt: skip
    return "\n".join(lines) or text.strip()


def cache_folder() -> Path:
    return Path(os.environ.get("KV4_METAL_CACHE", REPOSITORY / "build" / "metal" / "cache"))


def _delete_old_modules(folder: Path) -> None:
    """Every change to the emulator or to a kernel leaves modules behind that no build uses again."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have deleted it
            if path.is_file() and time.time() - path.stat().st_mtime > KEEP_DAYS * 86400:
                path.unlink()


@functools.cache
def tool_hash() -> str:
    """Hash of every file of this folder that a module depends on."""
    digest = hashlib.sha256()
    for path in sorted(HERE.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp") and "host" not in path.parts:
            digest.update(str(path.relative_to(HERE)).encode() + path.read_bytes())
    return digest.hexdigest()


def load(
    source: Path, include: Sequence[Path] = (), define: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[str, Translation]:
    """The preprocessed text and its translation."""
    text = preprocess(source, _compiler(), [*include, *INCLUDE], define)
    return text, translate(tokenise(text, str(source)), only)


def check_spaces(translation: Translation) -> str:
    """The static pass: compiles with real address spaces, runs nothing. Returns warnings; raises MetalError."""
    text = '#define EMU_STATIC 1\n#include "shim/metal.h"\n' + translation.static
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static.cpp"
        path.write_text(text)
        flags = ["-fsyntax-only", *LANGUAGE, "-Wno-ignored-attributes", "-Wno-null-dereference", f"-I{HERE}"]
        return run_tool([_compiler(), *flags, str(path)], "static")


def build(
    source: str | Path,
    mode: str = "check",
    include: Sequence[str | Path] = (),
    define: Sequence[str] = (),
    output: str | Path | None = None,
    only: Sequence[str] = (),
) -> Path:
    """The module of `source`, built if it is not in the cache. Beside it, with suffix .json, a description of its
    kernels. `output`: a copy under this name. `only`: instances of templates to build; all if empty. Raises MetalError
    with the compiler's or the translator's lines."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode}")
    source = Path(source).resolve()
    cxx = _compiler()
    text, translation = load(source, [Path(folder) for folder in include], define, only)
    parts = [text, *only, mode, cxx, KERNEL_FLAGS[mode], tool_hash()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    module = folder / f"{source.stem}.{mode}.{key}.so"
    if not module.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _delete_old_modules(folder)
        check_spaces(translation)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(translation, mode, cxx, Path(scratch))
            made.with_suffix(".json").write_text(json.dumps([_described(k) for k in translation.kernels]))
            os.replace(made.with_suffix(".json"), module.with_suffix(".json"))
            if mode == "count":
                os.replace(made.with_suffix(".blocks"), module.with_suffix(".blocks"))
            os.replace(made, module)
    if output is None:
        return module
    for suffix in [".so", ".json"] + ([".blocks"] if mode == "count" else []):
        to = Path(output).with_suffix(suffix)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module.with_suffix(suffix), to)
    return Path(output)


def _described(kernel: Kernel) -> dict:
    buffers = {p.index: p for p in kernel.parameters if p.is_buffer}
    return {
        "names": [host for host, _ in kernel.instances],
        "buffers": [
            {"name": p.name, "type": p.text, "written": p.space == "device" and "const" not in p.text.split()}
            if (p := buffers.get(i)) else None
            for i in range(max((i for i in buffers if i is not None), default=-1) + 1)
        ],
    }  # fmt: skip


def _compile(translation: Translation, mode: str, cxx: str, scratch: Path) -> Path:
    text = scratch / "kernels.cpp"
    text.write_text('#include "shim/metal.h"\n' + translation.run)
    common = [*LANGUAGE, *_machine_flags(), *KERNEL_FLAGS[mode].split()]
    # DWARF 4: addr2line of binutils 2.40 mixes up the files of version 5.
    common += ["-g1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", f"-I{HERE}"]
    kernels = scratch / "kernels.o"
    if mode == "count":
        _compile_counting(cxx, common, text, kernels)
    else:
        run_tool([cxx, *common, "-c", str(text), "-o", str(kernels)])
    module = scratch / "module.so"
    link = ["-shared-libasan", "-fsanitize=address"] if mode == "asan" else []
    objects = [str(runtime_object(name, mode, cxx)) for name in RUNTIME + EXTRA.get(mode, [])]
    run_tool([cxx, "-shared", "-Wl,-Bsymbolic", *link, str(kernels), *objects, "-o", str(module)])
    return module


def _compile_counting(cxx: str, flags: Sequence[str], text: Path, to: Path) -> None:
    """An object file with a counter in every basic block; what a block costs goes to module.blocks as JSON."""
    ir = to.with_suffix(".ll")
    run_tool([cxx, *flags, "-S", "-emit-llvm", "-DEMU_COUNT=1", str(text), "-o", str(ir)])
    instrumented, blocks = instrument(ir.read_text())
    ir.write_text(instrumented)
    costs = [[[kind, line, n] for (kind, line), n in block.costs.items()] for block in blocks]
    to.with_name("module.blocks").write_text(json.dumps(costs))
    run_tool([cxx, "-O1", "-fPIC", "-Wno-override-module", "-c", str(ir), "-o", str(to)])


def runtime_object(name: str, mode: str, cxx: str) -> Path:
    """An object file of the runtime; compiled for ASan apart from all others."""
    kind = "asan" if mode == "asan" else "plain"
    target = cache_folder() / f"{name}.{kind}.{tool_hash()[:20]}.o"
    if not target.exists():
        flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", *_machine_flags()]
        flags += ["-fsanitize=address"] if kind == "asan" else []
        with tempfile.NamedTemporaryFile(dir=cache_folder(), suffix=".o") as scratch:
            run_tool([cxx, *flags, "-c", str(HERE / "runtime" / f"{name}.cpp"), "-o", scratch.name])
            shutil.copyfile(scratch.name, f"{target}.{os.getpid()}")
        os.replace(f"{target}.{os.getpid()}", target)
    return target
