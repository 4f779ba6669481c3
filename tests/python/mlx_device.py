"""mlx.fast.metal_kernel's stand-in: the text that MLX itself writes around a body, run in the emulator of tests/metal.

MLX writes that text on any machine while a function is exported, and prints it if asked to. Where MLX has Metal its own
GPU takes the emulator's place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "metal"))

from emulator import mlx as written  # noqa: E402
from emulator.build import build, compiler  # noqa: E402
from emulator.module import Module, Output  # noqa: E402
from kv4.mlx.gpu import MlxHost, gpu_host  # noqa: E402

needs_gpu = pytest.mark.skipif(
    compiler() is None and not mx.metal.is_available(),
    reason="needs MLX with Metal, or the Metal emulator (clang++-19 and libclang-rt-19-dev)",
)

NAME = re.compile(r"\[\[kernel\]\] void (\w+)\(")


def text_of_mlx(kernel: Any, inputs: list[mx.array], **call: Any) -> str:
    """What MLX would hand to Apple's compiler after its own utilities, for this call of a metal_kernel."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "printed", "w+b") as printed:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(
                str(Path(folder) / "exported"), lambda *x: kernel(inputs=list(x), verbose=True, **call), *inputs
            )
        finally:
            os.dup2(before, 1)
            os.close(before)
        printed.seek(0)
        return printed.read().decode().split("```\n", 1)[1].rsplit("\n```", 1)[0]


def as_numpy(x: mx.array) -> np.ndarray:
    """The bytes of `x` in row order; bfloat16 as uint16."""
    return np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))


@functools.cache
def module_of(text: str, mode: str) -> Module:
    folder = ROOT / "build" / "metal" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mlx_{hashlib.sha256(text.encode()).hexdigest()[:16]}.metal"
    if not path.exists():
        path.write_text(written.PRELUDE + text, encoding="utf-8")
    return Module(build(path, mode))


class EmulatedKernel:
    """What metal_kernel returns. Findings of the checker are errors. `written`: what was compiled, and from what."""

    def __init__(self, mode: str, written: list | None = None, seed: int = 0, **arguments: Any) -> None:
        self.mode, self.seed = mode, seed
        self.written = written if written is not None else []
        self.kernel = mx.fast.metal_kernel(**arguments)
        self.known: dict[tuple, str] = {}

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]:
        call = {"template": template, "output_shapes": output_shapes, "output_dtypes": output_dtypes}
        # MLX would write another text for such an input, with an address space that the bodies do not take.
        assert all(x.ndim and x.size >= written.SMALL for x in inputs), "an input in the constant address space"
        key = (*(str(x.dtype) for x in inputs), str(template), str(output_dtypes))
        if key not in self.known:
            self.known[key] = text_of_mlx(self.kernel, inputs, grid=grid, threadgroup=threadgroup, **call)
            self.written.append((self.known[key], inputs, template, output_dtypes))
        text = self.known[key]
        name = NAME.search(text).group(1)
        made = [
            np.zeros(shape, np.uint16 if dtype == mx.bfloat16 else np.array(mx.zeros(1, dtype)).dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        arrays = [as_numpy(x) for x in inputs] + [Output(x) for x in made]
        done = module_of(text, self.mode).run(name, grid, threadgroup, arrays, seed=self.seed)
        assert done.result == "ran" and not done.reports, (name, done.result, done.reports)
        return [
            mx.array(x).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(x)
            for x, dtype in zip(made, output_dtypes, strict=True)
        ]


@functools.cache
def host(head_dim: int, mode: str = "fast") -> MlxHost:
    if mx.metal.is_available():
        return gpu_host(head_dim)
    return MlxHost(head_dim, functools.partial(EmulatedKernel, mode))
