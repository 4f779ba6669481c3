"""kv4 as an attention backend of vLLM: `--attention-backend CUSTOM` (docs/vllm.md).

`register` is the entry point that vLLM calls in each of its processes. Nothing of vLLM is changed, and a server that
does not ask for kv4 runs as without it.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes kv4 the backend that vLLM calls CUSTOM. May be called more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "kv4.vllm.choice.Backend")
    # The platform for CPUs takes this entry whatever was asked for; the choice is made where it is loaded.
    register_backend(AttentionBackendEnum.CPU_ATTN, "kv4.vllm.choice.CpuBackend")
