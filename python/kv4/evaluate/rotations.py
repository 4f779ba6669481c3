"""Rotations as float64 matrices, by the definitions of kv4/rotation.h, and two that the core has no use for."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

KINDS = ("identity", "srft", "srht", "householder", "haar")
_MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The first `count` words of SplitMix64 (Steele et al. 2014)."""
    words, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        words.append(z ^ (z >> 31))
    return words


@lru_cache(maxsize=64)
def rotation(kind: str, d: int, seed: int, reflectors: int = 0) -> np.ndarray:
    """R, [d, d] with x = R k, orthonormal. reflectors: householder only, 0 means d / 2. `haar` is uniform over all
    orthonormal matrices (Mezzadri 2007: QR of a Gaussian matrix with the signs of R's diagonal divided out).
    Errors: ValueError."""
    if kind == "identity":
        return np.eye(d)
    if kind == "srft":
        return _real_dft(d) * _signs(d, seed)
    if kind == "srht":
        odd = d
        while odd % 2 == 0:
            odd //= 2
        return np.kron(hadamard(d // odd), _odd_dft(odd)) * _signs(d, seed)
    if kind == "householder":
        return _householder(d, reflectors or d // 2, seed)
    if kind == "haar":
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
        return q * np.sign(np.diag(r))
    raise ValueError(f"rotation: expected one of {', '.join(KINDS)}; got {kind!r}")


def _signs(d: int, seed: int) -> np.ndarray:
    words = splitmix64(seed, (d + 63) // 64)
    return np.array([-1.0 if words[c // 64] >> (c % 64) & 1 else 1.0 for c in range(d)])


def _real_dft(d: int) -> np.ndarray:
    n = np.arange(d)
    rows = [np.ones(d), np.where(n % 2 == 0, 1.0, -1.0)]
    for j in range(1, d // 2):
        angle = 2 * np.pi * (j * n % d) / d
        rows += [np.sqrt(2) * np.cos(angle), -np.sqrt(2) * np.sin(angle)]
    return np.array(rows) / np.sqrt(d)


def hadamard(order: int) -> np.ndarray:
    """Sylvester's, orthonormal; order: a power of two."""
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(order)


def _odd_dft(m: int) -> np.ndarray:
    n = np.arange(m)
    rows = [np.full(m, 1 / np.sqrt(m))]
    for j in range(1, (m - 1) // 2 + 1):
        angle = 2 * np.pi * (j * n % m) / m
        rows += [np.sqrt(2 / m) * np.cos(angle), -np.sqrt(2 / m) * np.sin(angle)]
    return np.array(rows)


def _householder(d: int, reflectors: int, seed: int) -> np.ndarray:
    words = splitmix64(seed, reflectors * d)
    matrix = np.eye(d)
    for i in range(reflectors):
        g = np.array([sum(w >> s & 0xFFFF for s in (0, 16, 32, 48)) - 131070 for w in words[i * d : (i + 1) * d]])
        u = g / np.sqrt(float((g * g).sum()))
        matrix -= 2 * np.outer(u, u @ matrix)
    return matrix
