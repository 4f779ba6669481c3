"""OSCAR's recipe at its own setting, simulated: a peer at 2.25 bits.

Z. Zhou et al., OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization, arXiv 2605.17757,
2026. Keys are rotated by R = U H P: eigenvectors of E q q^T from the largest down, a Hadamard matrix, a bit-reversal
permutation; values with the eigenvectors of sum over tokens of w_t v_t v_t^T, w_t = k_t^T (sum q q^T) k_t. Codes
are 2 bits between the clipped minimum and maximum of a token's group of 128 channels, with an fp16 scale and zero; 64
sinks and the newest 256 tokens stay exact. Here clipping is the best of six shares for every token and group, in
place of one share per layer found beforehand, and a rotation is each KV head's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kv4.calibration import Calibration
from kv4.evaluate.calibrate import capture
from kv4.evaluate.rotations import hadamard
from kv4.evaluate.variant import SideVariant, Variant
from kv4.recipe import Recipe

Tensor = torch.Tensor


def variant(head_dim: int) -> Variant:
    """Errors: ValueError for a head dim that groups of 128, or of the whole vector below that, do not divide."""
    group = min(128, head_dim)
    if head_dim % group:
        raise ValueError(f"head_dim: expected a multiple of {group} for OSCAR's groups; got {head_dim}")
    side = SideVariant(rotation="given", bits=2, group=group, levels="uniform", scale="affine")
    return Variant(side, side, sinks=64, window=256)


def turned(moments: Tensor) -> Tensor:
    """x = R k of symmetric moments [heads, d, d]: rows of P H U^T. Errors: ValueError unless d is a power of two."""
    d = moments.shape[-1]
    if d & (d - 1):
        raise ValueError(f"head_dim: expected a power of two for OSCAR's Hadamard matrix; got {d}")
    vectors = torch.linalg.eigh(moments.double())[1].flip(-1)
    bits = d.bit_length() - 1
    order = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(d)]
    return torch.from_numpy(hadamard(d))[order] @ vectors.mT


def calibrate(
    model: Any,
    windows: Sequence[Tensor],
    *,
    identity: dict[str, Any] | None = None,
    text: str = "",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Rotations of every layer and KV head, from windows of ids [1, T]. Errors: ValueError."""
    if not windows:
        raise ValueError("windows: expected at least 1; got 0")
    sums: list[list[Tensor]] = []
    for ids in windows:
        for index, layer in enumerate(capture(model, ids)):
            heads, _, d = layer.key.shape
            q = layer.query.double().reshape(heads, -1, d)
            k, v = layer.key.double(), layer.value.double()
            key = q.mT @ q
            weight = torch.einsum("hti,hij,htj->ht", k, key, k)
            found = [key, v.mT @ (v * weight[..., None])]
            if index < len(sums):
                sums[index] = [a + b for a, b in zip(sums[index], found, strict=True)]
            else:
                sums.append(found)
        if progress:
            progress(ids.shape[1])
    tensors = {
        f"layer.{index}.{side}.matrix": turned(x).float()
        for index, pair in enumerate(sums)
        for side, x in zip(("key", "value"), pair, strict=True)
    }
    tokens = sum(ids.shape[1] for ids in windows)
    return Calibration(tensors, Recipe(), identity or {}, text, tokens, method="oscar")
