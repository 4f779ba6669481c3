"""torch.mps.compile_shader's stand-in: kernels run in the emulator of tests/metal, tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "metal"))

from emulator.build import build, compiler  # noqa: E402
from emulator.module import Module  # noqa: E402
from kv4.metal.mps import TorchHost  # noqa: E402

needs_emulator = pytest.mark.skipif(
    compiler() is None, reason="the Metal emulator needs clang++-19 and libclang-rt-19-dev"
)


def _bytes(x: torch.Tensor) -> np.ndarray:
    """The memory that a kernel would see: from the tensor's first element to the end of its storage."""
    size = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    return np.frombuffer((ctypes.c_uint8 * size).from_address(x.data_ptr()), np.uint8)


class EmulatedLibrary:
    """What compile_shader returns: a callable per entry point. Findings of the checker are errors."""

    def __init__(self, text: str, mode: str, seed: int = 0) -> None:
        folder = ROOT / "build" / "metal" / "python"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.metal"
        if not path.exists():
            path.write_text(text, encoding="utf-8")
        self.module, self.seed = Module(build(path, mode)), seed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.module.kernels:
            raise AttributeError(name)
        return functools.partial(self._run, name)

    def _run(self, name: str, *arguments: torch.Tensor, threads: list[int], group_size: list[int]) -> None:
        assert all(isinstance(x, torch.Tensor) and x.numel() for x in arguments), f"{name}: an empty or foreign buffer"
        done = self.module.run(name, threads, group_size, [_bytes(x) for x in arguments], seed=self.seed)
        assert done.result == "ran" and not done.reports, (name, done.result, done.reports)


@functools.cache
def host(head_dim: int, mode: str = "fast") -> TorchHost:
    return TorchHost("cpu", head_dim, lambda text: EmulatedLibrary(text, mode))
