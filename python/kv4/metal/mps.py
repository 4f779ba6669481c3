"""The cache on device="mps": PyTorch's tensors, kernels compiled by `torch.mps.compile_shader`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kv4.messages import mismatch

from . import source
from .cache import Cache
from .host import ATTEND_THREADS, DTYPES, MACOS, ROW_THREADS, THREADGROUP_BYTES, Host, Output, why_not_head_dim

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TorchHost(Host):
    """Kernels of one head dim on one device.

    compile_shader: turns Metal source into an object with a callable per entry point, called with the buffers and
    threads=, group_size= (torch.mps.compile_shader).
    Errors: NotImplementedError for a head dim without kernels; RuntimeError where the compiled kernels need more
    threads or threadgroup memory than the device has. Nothing is allocated before.
    """

    in_place = True

    def __init__(
        self, device: torch.device | str, head_dim: int, compile_shader: Callable[[str], Any], cores: int = 8
    ) -> None:
        reason = why_not_head_dim(head_dim)
        if reason is not None:
            raise NotImplementedError(reason)
        self.device = torch.device(device)
        self.head_dim, self.cores = head_dim, cores
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
        self.nothing = torch.zeros(16, dtype=torch.uint8, device=self.device)

    def run(
        self, name: str, inputs: Sequence[Any], outputs: Sequence[Output], threads: Sequence[int], group: int
    ) -> list[torch.Tensor]:
        made = [x if isinstance(x, torch.Tensor) else self.empty(*x) for x in outputs]
        kernel = getattr(self.library, name)
        kernel(*(x.detach() for x in inputs), *made, threads=list(threads), group_size=[group, 1, 1])
        return made

    def why_not_here(self, x: torch.Tensor) -> str | None:
        return None if x.device.type == self.device.type else str(x.device)

    def dtype(self, x: torch.Tensor) -> str:
        return _NAMES.get(x.dtype, str(x.dtype))

    def strides(self, x: torch.Tensor) -> list[int]:
        return list(x.stride())

    def zeros(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=_DTYPES[dtype], device=self.device)

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=_DTYPES[dtype], device=self.device)

    def table(self, values: Any) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(values))
        return x.to(self.device) if x.numel() else self.nothing

    def numpy(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.dtype is torch.bfloat16 else x).cpu().numpy()

    def bits(self, x: torch.Tensor) -> np.ndarray:
        return x.detach().cpu().contiguous().view(torch.uint8).numpy()

    def of_bits(self, bits: np.ndarray, dtype: str) -> torch.Tensor:
        return torch.from_numpy(bits).view(_DTYPES[dtype]).to(self.device)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def cast(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        return x.detach().to(self.device, _DTYPES[dtype])

    def concatenate(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(list(arrays), axis)

    def _indices(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(indices), device=self.device)

    def take(self, x: torch.Tensor, indices: Sequence[int], axis: int) -> torch.Tensor:
        return x.index_select(axis, self._indices(indices))

    def put(self, x: torch.Tensor, indices: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        return x.index_copy_(0, self._indices(indices), rows)

    def where(self, chosen: np.ndarray, x: torch.Tensor, y: Any) -> torch.Tensor:
        return torch.where(self.table(chosen), x, y)

    def finite(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, torch.zeros((), dtype=x.dtype, device=x.device))


class MetalCache(Cache):
    """`Cache` with the calls of kv4._core.Cache: results are written to tensors that the caller gives."""

    def attend(self, q: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        """q [batch, q_heads, T, head_dim], the newest T positions; out alike is written. The options are the core's:
        scale, softcap, sinks, causal, offset, start, window, mask."""
        self._check_output("out", out, [*q.shape[:3], self.dim])
        self.attended(q, out=out, **options)

    def attend_partial(
        self,
        q: torch.Tensor,
        o: torch.Tensor,
        m: torch.Tensor,
        l: torch.Tensor,  # noqa: E741
        *,
        upto: int,
        **options: Any,
    ) -> None:
        """The partial state over positions below upto: o float32 [batch, q_heads, T, head_dim], m, l without d."""
        for name, x, shape in (("o", o, [*q.shape[:3], self.dim]), ("m", m, [*q.shape[:3]]), ("l", l, [*q.shape[:3]])):
            self._check_output(name, x, shape)
        state = self.attended(q, upto=upto, **options)
        o.copy_(state[..., : self.dim])
        m.copy_(state[..., self.dim])
        l.copy_(state[..., self.dim + 1])

    def dense_keys(self, first: int, count: int, out: torch.Tensor) -> None:
        self._put_dense(False, first, count, out)

    def dense_values(self, first: int, count: int, out: torch.Tensor) -> None:
        self._put_dense(True, first, count, out)

    def _put_dense(self, values: bool, first: int, count: int, out: torch.Tensor) -> None:
        self._check_output("out", out, [self.batch, self.heads, count, self.dim])
        out.copy_(self.dense(values, first, count))

    def _check_output(self, name: str, x: torch.Tensor, shape: list[int]) -> None:
        """Before anything is recorded: what a call writes has `shape` and a place for every element."""
        elsewhere = self.host.why_not_here(x)
        if elsewhere is not None:
            raise ValueError(mismatch(name, "an array on the cache's device", elsewhere))
        if list(x.shape) != shape or (shape[-1] > 1 and x.stride(-1) != 1):
            raise ValueError(mismatch(name, f"shape {shape} and channel stride 1", list(x.shape)))
        if self.host.dtype(x) not in DTYPES:
            raise ValueError(mismatch(name, " or ".join(DTYPES), self.host.dtype(x)))
        if x.requires_grad:
            raise ValueError(mismatch(name, "a tensor that does not require grad", "one that does"))
        reach = 0
        for stride, count in sorted(zip(x.stride(), x.shape, strict=True)):
            if count > 1 and stride <= reach and x.numel():
                raise ValueError(mismatch(name, "a place of its own for every element", f"strides {list(x.stride())}"))
            reach += stride * (count - 1)


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
def mps_host(head_dim: int) -> TorchHost:
    """The host of this machine's Apple GPU. Errors: RuntimeError with the reason where there is none; TorchHost's."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    cores = getattr(torch.mps, "get_core_count", lambda: 8)()
    return TorchHost("mps", head_dim, torch.mps.compile_shader, cores)
