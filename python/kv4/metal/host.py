"""Kernels on a device: compiling, checking what the device gives, and launching. Every argument of a kernel is a
buffer, in the order of its declaration in src/metal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kv4 import _core
from kv4.messages import mismatch

from . import source

ATTEND_THREADS, ROW_THREADS = 128, 256  # src/metal/arguments.h
THREADGROUP_BYTES = 32768  # what every Apple GPU has (Metal Feature Set Tables)
MACOS = (14, 0)  # Metal 3.1
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Host:
    """Kernels of one head dim on one device.

    compile_shader: turns Metal source into an object with a callable per entry point, called with the buffers and
    threads=, group_size= (torch.mps.compile_shader). cores: GPU cores to fill, as far as known.
    Errors: NotImplementedError for a head dim without kernels; RuntimeError where the compiled kernels need more
    threads or threadgroup memory than the device has. Nothing is allocated before.
    """

    def __init__(
        self, device: torch.device | str, head_dim: int, compile_shader: Callable[[str], Any], cores: int = 8
    ) -> None:
        if head_dim not in HEAD_DIMS:
            known = ", ".join(map(str, HEAD_DIMS))
            raise NotImplementedError(mismatch("head_dim", f"one of {known} on Metal", head_dim))
        self.device = torch.device(device)
        self.cores = cores
        self.library = compile_shader(source.text(head_dim))
        for name, threads in (
            (f"kv4_attend_d{head_dim}_r8", ATTEND_THREADS),
            ("kv4_prepare", ROW_THREADS),
            ("kv4_merge", ROW_THREADS),
            ("kv4_seal", ROW_THREADS),
            ("kv4_dequantise", ROW_THREADS),
        ):
            kernel = getattr(self.library, name)
            limit = getattr(kernel, "max_threads_per_threadgroup", threads)
            if limit < threads:
                raise RuntimeError(mismatch("device", f"{threads} threads per threadgroup for {name}", limit))
            memory = getattr(kernel, "static_thread_group_memory_length", 0)
            if memory > THREADGROUP_BYTES:
                expected = f"at most {THREADGROUP_BYTES} bytes of threadgroup memory for {name}"
                raise RuntimeError(mismatch("device", expected, memory))
        self.nothing = torch.zeros(16, dtype=torch.uint8, device=self.device)  # in place of buffers that are not read

    def launch(self, name: str, arguments: Sequence[torch.Tensor], threads: Sequence[int], group: int) -> None:
        """Dispatches `threads` threads, `group` of them along the first axis a threadgroup."""
        getattr(self.library, name)(*arguments, threads=list(threads), group_size=[group, 1, 1])

    def tensor(self, values: np.ndarray | Sequence[int]) -> torch.Tensor:
        """A table on the device; sixteen bytes of nothing for an empty one."""
        x = torch.from_numpy(np.ascontiguousarray(values))
        return x.to(self.device) if x.numel() else self.nothing


def why_not() -> str | None:
    """None where PyTorch has a Metal device that the kernels run on, else the reason."""
    mps = torch.backends.mps
    if not mps.is_built():
        return mismatch("device", "a PyTorch built with MPS (macOS on Apple silicon)", "one without")
    newer = getattr(mps, "is_macos_or_newer", None)
    if newer is not None and not newer(*MACOS):
        return mismatch("device", f"macOS {MACOS[0]}.{MACOS[1]} or newer (Metal 3.1)", "an older one")
    if not mps.is_available():
        return mismatch("device", "a Metal device", "none")
    if not hasattr(torch.mps, "compile_shader"):
        return mismatch("torch", "torch.mps.compile_shader (PyTorch 2.6 or newer)", torch.__version__)
    return None


@functools.cache
def mps_host(head_dim: int) -> Host:
    """The host of this machine's Apple GPU. Errors: RuntimeError with the reason where there is none; Host's."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    cores = getattr(torch.mps, "get_core_count", lambda: 8)()
    return Host("mps", head_dim, torch.mps.compile_shader, cores)


class Constants:
    """What the kernels read of one recipe: matrices, level tables, layout. Layers of one shape share it."""

    def __init__(self, host: Host, tables: Any, head_dim: int) -> None:
        square = (head_dim, head_dim)

        def matrix(values: np.ndarray, *shape: int) -> torch.Tensor:
            return host.tensor(values.reshape(shape) if values.size else values)

        self.tables = tables
        self.query = matrix(tables.query_matrix(), *square)
        self.output = [matrix(tables.output_matrix(values), *square) for values in (False, True)]
        self.sealing = [matrix(tables.sealing_matrix(values), 2, *square) for values in (False, True)]
        self.levels = [host.tensor(tables.levels(values)) for values in (False, True)]
        self.side = [host.tensor(tables.side(values, head_dim)) for values in (False, True)]


@functools.lru_cache(maxsize=64)
def shared_constants(host: Host, recipe: Any, dtype: str, kv_heads: int, head_dim_k: int, head_dim_v: int) -> Constants:
    tables = _core.MetalTables(recipe, dtype=dtype, kv_heads=kv_heads, head_dim_k=head_dim_k, head_dim_v=head_dim_v)
    return Constants(host, tables, head_dim_k)
