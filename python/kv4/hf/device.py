"""The devices and dtypes that kv4 has kernels for, the core behind a layer, and the stream its calls are queued on."""

from __future__ import annotations

from typing import Any

import torch

from kv4 import _core
from kv4.messages import mismatch
from kv4.metal import mps
from kv4.recipe import Recipe

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# One integer from torch's C side, without the Stream object that torch.cuda.current_stream builds.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The cudaStream_t that torch queues on now, on a CUDA device."""
    if _raw_stream is not None and device.index is not None:
        return _raw_stream(device.index)
    return torch.cuda.current_stream(device).cuda_stream


def on_stream(core: Any, device: torch.device) -> None:
    """Orders the core's next calls on `device` after torch's queued work there. Does nothing on the CPU."""
    if device.type == "cuda":
        core.set_stream(current_stream(device))


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Errors: ValueError where kv4 has no kernels for the tensor's dtype."""
    if x.dtype not in DTYPES:
        raise ValueError(mismatch(name, "float32, float16 or bfloat16", x.dtype))


def check_device(name: str, device: torch.device) -> None:
    """Errors: ValueError where kv4 has no kernels for tensors on `device`, with the reason."""
    reason = why_no_device(device)
    if reason is not None:
        raise ValueError(mismatch(name, f"a tensor on {usable_devices()}", f"{device}{reason}"))


def existing_device(name: str, device: Any) -> torch.device:
    """`device` with an explicit index. Errors: ValueError with the reason where kv4 has no kernels for it."""
    device = torch.device(device)
    reason = why_no_device(device)
    if reason is not None:
        raise ValueError(mismatch(name, usable_devices(), f"{device}{reason}"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def why_no_device(device: torch.device) -> str | None:
    """None where kv4 runs on `device`; else "", or the reason in brackets."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        reason = mps.why_not()
    elif device.type == "cuda":
        reason = _core.why_not("cuda")
    else:
        return ""
    return f" ({reason})" if reason else None


def usable_devices() -> str:
    if torch.backends.mps.is_available():
        return "the CPU or an Apple GPU"
    return "the CPU or a CUDA device" if "cuda" in _core.backends() else "the CPU"


def place(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it with channel stride 1, which kernels read."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def new_core(device: torch.device, recipe: Recipe, **arguments: Any) -> Any:
    """The cache behind a layer: the C++ core, or on Apple GPUs its counterpart kv4.metal.mps.MetalCache. Errors:
    RuntimeError, ValueError or NotImplementedError with the reason where device, recipe or head dims are not served."""
    if device.type == "mps":
        return mps.MetalCache(mps.mps_host(arguments["head_dim_k"]), recipe, **arguments)
    backend = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    return _core.Cache(recipe, backend=backend, **arguments)
