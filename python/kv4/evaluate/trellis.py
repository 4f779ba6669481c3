"""Trellis-coded quantisation: levels that depend on the code before, and codes chosen as a path of least error.

M. W. Marcellin and T. R. Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, IEEE Trans.
Commun. 38, 1990. As many bits a value as a plain quantiser has, but of two to four times as many levels in all; the
state, two bits of the code before, says which of them a code may stand for. Codes of a chain are found together by
the Viterbi algorithm (G. D. Forney, The Viterbi algorithm, Proc. IEEE 61, 1973). Levels are the core's
(src/recipe/levels.cpp); codes are those of odd places, which pages hold with pairs of bits swapped at even ones.

Four chains are interleaved: place i of a row follows place i - 4, and the first four follow none, which is state 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kv4 import _core

Tensor = torch.Tensor
CHAINS = 4
BITS = (2, 3, 4)
STATES = 4
_SLICE = 4096  # chains at a time: 64 branches of each then fit a second-level cache


@lru_cache
def levels(bits: int) -> tuple[tuple[int, ...], ...]:
    """[state][code], integers that fit int8. Errors: ValueError."""
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))} with a trellis; got {bits}")
    return tuple(map(tuple, _core.trellis_levels(bits)))


@dataclass(frozen=True)
class _Branches:
    """The trellis between one place of a chain and the next, by the state that a branch leads to: [states, branches]
    each. before: the state it comes from; codes; levels."""

    before: Tensor
    codes: Tensor
    levels: Tensor


@lru_cache
def _branches(bits: int) -> _Branches:
    into: list[list[tuple[int, int, int]]] = [[] for _ in range(STATES)]
    for state, row in enumerate(levels(bits)):
        for code, level in enumerate(row):
            into[code % STATES].append((state, code, level))
    before, codes, level = torch.tensor(into).unbind(-1)
    return _Branches(before, codes.to(torch.int8), level)


def encode(y: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., n] of the least sum of (y - level)^2 over each of the four chains along the last axis of y
    [..., n], values in units of a step. Errors: ValueError for y that is not of floating point."""
    if not y.is_floating_point():
        raise ValueError(f"y: expected values of floating point; got {y.dtype}")
    levels(bits)
    n = y.shape[-1]
    flat = y.reshape(-1, n)
    codes = torch.empty(flat.shape, dtype=torch.int8)
    for lo in range(0, len(flat), max(1, _SLICE // CHAINS)):
        some = flat[lo : lo + max(1, _SLICE // CHAINS)]
        whole = n - n % CHAINS
        if whole == n:
            found = _paths(some.unflatten(1, (-1, CHAINS)).permute(1, 0, 2).flatten(1), bits)
            codes[lo : lo + len(some)] = found.view(-1, len(some), CHAINS).permute(1, 0, 2).flatten(1)
        else:  # chains of two lengths
            for first in range(min(n, CHAINS)):
                codes[lo : lo + len(some), first::CHAINS] = _paths(some[:, first::CHAINS].T, bits).T
    return codes.view(y.shape)


def _paths(y: Tensor, bits: int) -> Tensor:
    """Codes int8 [places, chains] of the paths of least error through y [places, chains]."""
    branches = _branches(bits)
    states, count = branches.before.shape
    level = branches.levels.to(y.dtype)[..., None]
    places, chains = y.shape
    total = torch.full((states, chains), torch.inf, dtype=y.dtype)
    total[0] = 0
    chosen = torch.empty(places, states, chains, dtype=torch.uint8)
    for place in range(places):
        error = (y[place] - level).square_().add_(total[branches.before])
        total, best = error.min(1)
        chosen[place] = best
    at = total.argmin(0)
    codes = torch.empty(places, chains, dtype=torch.int8)
    before, coded = branches.before.flatten(), branches.codes.flatten()
    for place in range(places - 1, -1, -1):
        branch = at * count + chosen[place].gather(0, at[None])[0]
        codes[place] = coded[branch]
        at = before[branch]
    return codes


def decode(codes: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels [..., n] that codes [..., n] stand for, chains along the last axis. Errors: ValueError for codes that are
    not integers or have more bits."""
    if codes.is_floating_point():
        raise ValueError(f"codes: expected integers; got {codes.dtype}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes: expected 0 to {2**bits - 1}; got {int(codes.min())} to {int(codes.max())}")
    own = codes.long()
    state = torch.zeros_like(own)
    state[..., CHAINS:] = own[..., :-CHAINS] % STATES
    return torch.tensor(levels(bits), dtype=dtype)[state, own]
