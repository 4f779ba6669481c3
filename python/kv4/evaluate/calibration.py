"""What a calibration is made of: lambda from energies, a matrix for keys from second moments."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_FLOOR = 1e-6  # of the mean over the channels, as the core's


def lambda_from_energies(query: Tensor, key: Tensor, shrink: float = 0.0) -> Tensor:
    """(E q_c^2 / E (k_c - mu_c)^2)^(1/4) with geometric mean 1, float64 [heads, d], from energies [heads, d] in any
    unit. Each is first drawn by `shrink` towards its rotary pair's mean and clamped from below (src/moments)."""

    def prepared(energy: Tensor) -> Tensor:
        energy = energy.double()
        floor = _FLOOR * energy.mean(-1, keepdim=True)
        first, second = energy.chunk(2, -1)
        pair = (first + second) / 2
        drawn = torch.cat([first + shrink * (pair - first), second + shrink * (pair - second)], -1)
        return torch.maximum(drawn, floor)

    if not (bool((query.sum(-1) > 0).all()) and bool((key.sum(-1) > 0).all())):
        return torch.ones(key.shape, dtype=torch.float64)
    log = 0.25 * (prepared(query).log() - prepared(key).log())
    return (log - log.mean(-1, keepdim=True)).exp()


def score_transform(key: Tensor, query: Tensor, rotation: Tensor) -> Tensor:
    """The T = R diag(lambda) U^T-like matrix, [heads, d, d], that minimises tr(T S_k T^T) tr(T^-T S_q T^-1) over
    invertible T, rotated by R so that every stored channel carries the same share of both.

    key, query: S_k and S_q, symmetric positive definite [heads, d, d]. The product depends on M = T^T T alone, as
    tr(M S_k) tr(M^-1 S_q); M S_k M = c S_q is where it is stationary, so M is the geometric mean of S_k^-1 and S_q:
    M = S_k^-1/2 (S_k^1/2 S_q S_k^1/2)^1/2 S_k^-1/2 (Bhatia, Positive Definite Matrices, 2007, chapter 4). T = R M^1/2,
    scaled to |det T| = 1."""

    def power(x: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(x)
        values = values.clamp(min=_FLOOR * float(values.mean().clamp(min=1e-30)))
        return vectors @ (values**exponent)[:, :, None].mul(vectors.mT)

    key, query = key.double(), query.double()
    root, inverse = power(key, 0.5), power(key, -0.5)
    metric = inverse @ power(root @ query @ root, 0.5) @ inverse
    half = power((metric + metric.mT) / 2, 0.5)
    scale = torch.linalg.slogdet(half).logabsdet / half.shape[-1]
    return rotation.double() @ (half * (-scale).exp()[:, None, None])
