"""The guideline checks find what they are for, and nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_guidelines.py"
spec = importlib.util.spec_from_file_location("check_guidelines", SCRIPT)
assert spec is not None
assert spec.loader is not None
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)


def findings(tmp_path: Path, path: str, text: str) -> list[str]:
    if not (tmp_path / ".git").exists():
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return checks.check_tree(tmp_path)


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("src/cache/a.cpp", '#include "reference/seal.h"\n', 'src/cache must not include "reference/seal.h"'),
        ("src/backend/a.h", '#include "cache/pool.h"\n', 'src/backend must not include "cache/pool.h"'),
        ("src/cpu/a.cpp", '#include "cuda/seal.h"\n', 'src/cpu must not include "cuda/seal.h"'),
        ("include/kv4/a.h", '#include "format/page.h"\n', 'include/kv4 must not include "format/page.h"'),
        ("include/kv4/a.h", "#include <immintrin.h>\n", "<immintrin.h> belongs into the folder of one instruction set"),
        ("src/cpu/a.inl", "x = _mm256_add_ps(a, b);\n", "intrinsics belong into src/cpu/<isa>/: _mm256_add_ps"),
        ("src/cpu/a.inl", "x = vaddq_f32(a, b);\n", "intrinsics belong into src/cpu/<isa>/: vaddq_f32"),
        ("src/cpu/neon/a.h", '#include "cpu/avx2/dot.h"\n', '"cpu/avx2/dot.h" is for avx2 alone'),
        ("src/new/a.cpp", "int a;\n", "src/new has no place in the layers"),
        ("src/cache/a.cpp", "if (x) std::abort();\n", "the core never prints, exits, aborts or throws: std::abort"),
        ("src/cache/a.cpp", "throw 1;\n", "the core never prints, exits, aborts or throws: throw"),
        ("src/cache/a.cpp", "#ifdef __CUDA_ARCH__\n", "device switches belong into a backend"),
        ("src/cache/a.cpp", "int a;\n" * 601, "601 lines; at most 600 are allowed"),
        ("src/metal/a.metal", "// " + "a" * 118 + "\n", "121 columns; at most 120 are allowed"),
        ("python/kv4/hf/handle.py", "from .layer import KV4Layer\n", "kv4.hf.handle must not import kv4.hf.layer"),
        ("python/kv4/hf/layer.py", "from . import attention\n", "kv4.hf.layer must not import kv4.hf.attention"),
        (
            "python/kv4/hf/ops.py",
            "def f():\n    import kv4.hf.attention\n",
            "kv4.hf.ops must not import kv4.hf.attention",
        ),
        (
            "python/kv4/hf/device.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .handle import Held\n",
            "kv4.hf.device must not import kv4.hf.handle",
        ),
        ("python/kv4/mlx/cache.py", "from kv4.mlx import KVHandle\n", "kv4.mlx.cache must not import kv4.mlx.__init__"),
        ("python/kv4/metal/mps.py", "from kv4.hf.device import place\n", "kv4.metal.mps must not import kv4.hf.device"),
        ("python/kv4/hf/cache.py", "from ..bench import text\n", "kv4.hf.cache must not import kv4.bench.text"),
        ("python/kv4/recipe.py", "import kv4\n", "kv4.recipe must not import kv4.__init__"),
        ("python/kv4/recipe.py", 'import_module("kv4.shared")\n', "kv4.recipe must not import kv4.shared"),
        ("python/kv4/hf/new.py", "import torch\n", "kv4.hf.new has no place in the layers"),
        ("README.md", "from https://" + "pypi" + ".org/simple\n", "names a registry's host"),
        ("docs/a.md", "see /" + "root/notes\n", "names a path of one machine"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, path: str, text: str, says: str) -> None:
    found = findings(tmp_path, path, text)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")
    assert says in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("src/cache/a.cpp", '#include "backend/backend.h"\n#include "kv4/cache.h"\n#include <vector>\n'),
        ("src/cache/a.cpp", 'static_assert(true);  // never throw\nconst char* text = "abort";\n'),
        ("src/cpu/avx2/a.h", "#include <immintrin.h>\nx = _mm256_add_ps(a, b);\n"),
        ("python/kv4/recipe.py", "import numpy\nfrom kv4 import _core\nfrom kv4.messages import mismatch\n"),
        ("python/kv4/hf/layer.py", "from kv4.metal import mps\nfrom . import ops\nfrom .handle import Held\n"),
        ("python/kv4/hf/__init__.py", "from .attach import attach\nfrom .cache import KV4Cache\n"),
        ("python/kv4/cli/info.py", "def f():\n    from kv4 import Recipe\n    from kv4.hf import attach\n"),
        ("tests/cpp/a.cpp", '#include "reference/seal.h"\nint main() { throw 1; }\n'),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, text: str) -> None:
    assert findings(tmp_path, path, text) == []


def test_the_packages_of_python_stand_in_their_order() -> None:
    above: set[str] = set()
    for package, (allowed, _) in checks.PYTHON.items():
        assert allowed <= above, package
        above.add(package)


def test_the_lists_of_modules_name_those_that_there_are() -> None:
    for package, (_, listed) in checks.PYTHON.items():
        folder = SCRIPT.parents[1] / "python" / package.replace(".", "/")
        there = {file.stem for file in folder.glob("*.py")} - {"__init__"}
        modules = [name for name in listed.split() if name != "_core"]  # compiled
        assert sorted(modules) == sorted(there), package


def test_this_repository_keeps_its_rules() -> None:
    assert checks.check_tree(SCRIPT.parents[1]) == []


@pytest.mark.parametrize(
    ("pattern", "some", "none"),
    [
        ("src/*.cpp", ["src/cache/save.cpp", "src/rotation/srft.cpp"], "src/cuda/"),
        ("src/rotation/*.cpp", ["src/rotation/srft.cpp"], "src/cache/"),
        ("src/rotation/srft.cpp", ["src/rotation/srft.cpp"], "src/rotation/dense.cpp"),
    ],
)
def test_clang_tidy_reads_the_files_that_it_is_given(pattern: str, some: list[str], none: str) -> None:
    shown = subprocess.run(
        ["make", "--silent", "--eval", "linted: ; @$(LINTED)", "linted", f"LINT_FILES={pattern}"],
        cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert set(some) <= set(shown)
    assert not [file for file in shown if file.startswith((none, "src/cuda/", "src/reference/"))]
