"""No gradient passes through a KV4Cache: a backward pass raises instead of returning a wrong one."""

from __future__ import annotations

from typing import Any

import torch


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "query: expected inference; got a backward pass: no gradient passes through a KV4Cache (use_cache=False "
            "gives one, and so does kv4.hf.detach(model))"
        )


def without_gradient(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Attention's output from a KV4Cache, whose backward pass raises RuntimeError where one would reach the query."""
    if query.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Refused.apply(output, query)
    return output
