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
        ("tests/cpp/a.cpp", '#include "reference/seal.h"\nint main() { throw 1; }\n'),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, text: str) -> None:
    assert findings(tmp_path, path, text) == []


def test_this_repository_keeps_its_rules() -> None:
    assert checks.check_tree(SCRIPT.parents[1]) == []
