"""Chooses the backend class: kv4's for the running version of vLLM where it was selected, else vLLM's own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kv4.messages import mismatch

# Modules for particular versions of vLLM, by major and minor version.
VERSIONS = {"0.26": "kv4.vllm.v0_26", "0.32": "kv4.vllm.v0_32"}


def supported_module(version: str) -> str:
    """The module of that version. Raises NotImplementedError naming those that work."""
    found = VERSIONS.get(".".join(version.split(".")[:2]))
    if found is None:
        raise NotImplementedError(mismatch("vllm", "version " + ", ".join(f"{known}.x" for known in VERSIONS), version))
    return found


def __getattr__(name: str) -> Any:
    if name == "Backend":
        import vllm

        return import_module(supported_module(vllm.__version__)).Backend
    if name == "CpuBackend":
        from vllm.config import get_current_vllm_config
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if get_current_vllm_config().attention_config.backend == AttentionBackendEnum.CUSTOM:
            return __getattr__("Backend")
        return resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
    raise AttributeError(f"module 'kv4.vllm.choice' has no attribute {name!r}")
