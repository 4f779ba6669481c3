"""kv4 as an attention backend of vLLM: `--attention-backend CUSTOM` (docs/vllm.md).

`register` is the entry point that vLLM calls in each of its processes. It changes nothing in vLLM, and a server that
does not select kv4 is unaffected.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes kv4 the backend that vLLM calls CUSTOM. May be called more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "kv4.vllm.choice.Backend")
    # The CPU platform loads this entry whichever backend was selected; choice.py decides when it is loaded.
    register_backend(AttentionBackendEnum.CPU_ATTN, "kv4.vllm.choice.CpuBackend")
