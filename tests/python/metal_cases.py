"""A cache of kv4.metal and the C++ core, fed alike; its kernels run in emulation."""

from __future__ import annotations

import numpy as np
import torch

from kv4 import Recipe, Side, _core
from kv4.metal.mps import MetalCache
from metal_device import host

HEADS, GROUP = 2, 2
RECIPES = {
    "default": Recipe(),
    "exact": Recipe.exact(),
    "paper": Recipe.paper(),
    "no window": Recipe(window=0, sinks=0),
    "hadamard, uniform": Recipe(
        key=Side(rotation="srht", levels="uniform", scale="abs_max"), value=Side(rotation="householder"), sinks=1
    ),
}
TOLERANCE = 2e-3  # of attention, against the largest output


class Pair:
    """A MetalCache and the C++ core, fed alike."""

    def __init__(
        self, recipe: Recipe, dim: int = 64, batch: int = 1, dtype=torch.float32, mode="fast", seed=5, **options
    ):
        arguments = {"dtype": str(dtype).removeprefix("torch."), "kv_heads": HEADS, "head_dim_k": dim}
        arguments |= {"head_dim_v": dim, **options}
        self.metal = MetalCache(host(dim, mode), recipe, **arguments)
        self.core = _core.Cache(recipe, **arguments)
        self.batch, self.dim, self.dtype = batch, dim, dtype
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, heads: int, tokens: int) -> torch.Tensor:
        # [batch, T, heads, d] in memory, like a model's projections.
        x = torch.randn((self.batch, tokens, heads, self.dim), generator=self.random)
        scale = torch.logspace(-0.5, 0.5, self.dim)
        return (x * scale + 2 * scale.flip(0)).transpose(1, 2).to(self.dtype)

    def step(self, tokens: int, **options) -> None:
        k, v = self.normal(HEADS, tokens), self.normal(HEADS, tokens)
        for cache in (self.metal, self.core):
            cache.append(k, v)
        self.attend(tokens, **options)
        self.compare()

    def attend(self, tokens: int, **options) -> None:
        q = self.normal(HEADS * GROUP, tokens)
        out = [torch.full((self.batch, tokens, HEADS * GROUP, self.dim), 7.0, dtype=self.dtype) for _ in range(2)]
        self.metal.attend(q, out[0].transpose(1, 2), **options)
        self.core.attend(q, out[1].transpose(1, 2), **options)
        rounding = 0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps
        bound = (TOLERANCE + rounding) * out[1].abs().max()
        assert (out[0].float() - out[1].float()).abs().max() <= bound

    def both(self, name: str, *arguments) -> None:
        for cache in (self.metal, self.core):
            getattr(cache, name)(*arguments)
        self.batch = self.core.batch or self.batch
        self.compare()

    def compare(self) -> None:
        metal, core = self.metal, self.core
        assert (metal.length, metal.batch, metal.first) == (core.length, core.batch, core.first)
        for b in range(core.batch):
            assert metal.sealed_tokens(b) == core.sealed_tokens(b)
            assert metal.exact_tokens(b) == core.exact_tokens(b)
            assert np.allclose(metal.lambda_(b), core.lambda_(b), rtol=1e-5)
            for page in range(core.page_count(b)):
                for head in range(HEADS):
                    for ours, theirs in zip(
                        metal.page_codes(b, page, head), core.page_codes(b, page, head), strict=True
                    ):
                        a, c = np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)
                        # Both meet the definition's rule; a value on a decision boundary may go either way.
                        assert (a != c).mean() <= 1e-3
