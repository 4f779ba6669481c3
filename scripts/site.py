#!/usr/bin/env python3
"""Lays out the documentation for mkdocs in build/site-source: the repository's pages at their own places, README.md as
the first, and pages of reference made of docstrings and headers."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "site-source"
HEADERS = ("cache.h", "paged.h", "attention.h", "recipe.h", "types.h", "status.h", "cpu.h", "kv4.h")
# What a user of Python calls, by the file that has it.
PYTHON = {
    "kv4": "__init__.py recipe.py",
    "kv4.hf": "hf/attach.py hf/cache.py hf/calls.py hf/graph.py hf/handle.py",
    "kv4.mlx": "mlx/attach.py mlx/cache.py mlx/handle.py",
    "kv4.calibration": "calibration.py",
    "kv4.models": "models/store.py",
}


def public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node


def entry(node: ast.ClassDef | ast.FunctionDef, level: int) -> Iterator[str]:
    """Heading, signature, docstring, and the public methods of a class. What has no docstring is left out."""
    text = ast.get_docstring(node)
    if text is None:
        return
    if isinstance(node, ast.ClassDef):
        signature = f"class {node.name}"
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{node.name}({ast.unparse(node.args)}){returns}"
    yield f"{'#' * level} {node.name}\n\n```python\n{signature}\n```\n\n{text}\n"
    if isinstance(node, ast.ClassDef):
        for method in public(node.body):
            yield from entry(method, level + 1)


def python_page() -> str:
    parts = ["# Python\n"]
    for module, files in PYTHON.items():
        parts.append(f"## {module}\n")
        for name in files.split():
            tree = ast.parse((ROOT / "python" / "kv4" / name).read_text(encoding="utf-8"))
            if name.endswith("__init__.py"):
                parts.append(f"```text\n{ast.get_docstring(tree)}\n```\n")
            for node in public(tree.body):
                parts.extend(entry(node, 3))
    return "\n".join(parts)


def headers_page() -> str:
    parts = ["# C and C++\n\nThe public headers, which are their own reference.\n"]
    for name in HEADERS:
        text = (ROOT / "include" / "kv4" / name).read_text(encoding="utf-8")
        parts.append(f"## kv4/{name}\n\n```{'c' if name == 'kv4.h' else 'cpp'}\n{text}```\n")
    return "\n".join(parts)


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(ROOT / "docs", TARGET / "docs")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, TARGET / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # Folders of the repository have no page.
    readme = re.sub(r"\[(\w+/)\]\(\w+\)", r"`\1`", readme)
    # The badges lie beside the repository.
    readme = re.sub(r"^\[!\[.*\n", "", readme, flags=re.MULTILINE)
    (TARGET / "index.md").write_text(readme, encoding="utf-8")
    (TARGET / "api").mkdir()
    (TARGET / "api" / "python.md").write_text(python_page(), encoding="utf-8")
    (TARGET / "api" / "headers.md").write_text(headers_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
