"""R and lambda learned by gradient descent on the squared error of a calibration text's keys and values.

The ablation of arXiv 2605.05699: a learned rotation lowers the error on the calibration text and need not help the
model. R is a Cayley transform of a skew matrix, R = (I - A)^-1 (I + A), which is orthonormal; lambda is an exponential.
The error is a continuous function of R and lambda, and codes are constant between the points where they change: its
gradient is that of fixed codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kv4._core import PAGE_TOKENS
from kv4.calibration import Calibration
from kv4.evaluate.calibrate import Layer
from kv4.evaluate.levels import levels, step_rule
from kv4.evaluate.rotations import rotation
from kv4.recipe import Recipe

Tensor = torch.Tensor
STEPS = 60
_RATE = 0.01
_TOKENS = 512  # rows of one head in a step


def learn(
    layers: Sequence[Layer],
    *,
    after_srft: bool,
    lambda_only: bool = False,
    recipe: Recipe | None = None,
    model: dict[str, Any] | None = None,
    steps: int = STEPS,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """A Calibration with a matrix and a lambda per layer and side, from captured layers. after_srft: the learned
    rotation follows the recipe's own, else it starts from the identity. lambda_only: the recipe's rotation stays and
    lambda alone is learned. Calls progress(1) for each layer."""
    recipe = recipe or Recipe()
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        for side, rows in (("key", layer.key), ("value", layer.value)):
            rows = rows[:, recipe.sinks :]
            if side == "key" and recipe.key.mean:
                rows = torch.cat([block - block.mean(1, keepdim=True) for block in rows.split(PAGE_TOKENS, 1)], 1)
            start = torch.eye(rows.shape[-1], dtype=torch.float64)
            if after_srft or lambda_only:
                given = getattr(recipe, side)
                start = torch.from_numpy(rotation(given.rotation, rows.shape[-1], given.seed, given.reflectors))
            matrix, lam = _descend(rows.clone().float(), start.float(), steps, lambda_only)
            tensors[f"layer.{index}.{side}.matrix"] = matrix
            tensors[f"layer.{index}.{side}.lambda"] = lam
        if progress:
            progress(1)
    side = replace(recipe.key, rotation="dense", lambda_="given", reflectors=0)
    value = replace(recipe.value, rotation="dense", lambda_="given", reflectors=0)
    name = "lambda" if lambda_only else "R and lambda" + (" after the recipe's rotation" if after_srft else "")
    return Calibration(tensors, replace(recipe, key=side, value=value), model or {}, method=f"learned {name}")


def squared_error(rows: Tensor, matrix: Tensor, log_lambda: Tensor) -> Tensor:
    """Mean of |x - x^|^2 over that of |x|^2 for rows [heads, T, d], one scale per vector, 4-bit Lloyd-Max levels."""
    table = levels("lloyd_max", 4)
    weight = (log_lambda - log_lambda.mean(-1, keepdim=True)).exp()[:, None]
    x = (rows * weight) @ matrix.mT
    _, factor = step_rule("lloyd_max", 4, "least_squares", x.shape[-1])  # by the largest at 4 bits
    step = factor * x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    y = x / step
    magnitude = torch.tensor(table.magnitude)
    level = magnitude[torch.bucketize(y.detach().abs(), torch.tensor(table.boundaries))] * y.detach().sign()
    fit = (y.detach() * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True).clamp(min=1e-30)
    error = ((level * fit * step).detach() - x) @ matrix / weight
    return error.square().mean() / rows.square().mean()


def _descend(rows: Tensor, start: Tensor, steps: int, lambda_only: bool) -> tuple[Tensor, Tensor]:
    heads, tokens, d = rows.shape
    skew = torch.zeros((d, d), requires_grad=not lambda_only)
    log_lambda = torch.zeros((heads, d), requires_grad=True)
    parameters = [log_lambda] if lambda_only else [skew, log_lambda]
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    picks = torch.Generator().manual_seed(0)
    eye = torch.eye(d)

    def turned() -> Tensor:
        if lambda_only:
            return start
        a = skew - skew.mT
        return torch.linalg.solve(eye - a, eye + a) @ start

    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randperm(tokens, generator=picks)[:_TOKENS]
            optimiser.zero_grad()
            loss = squared_error(rows[:, chosen], turned(), log_lambda)
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        lam = (log_lambda - log_lambda.mean(-1, keepdim=True)).exp()
        return turned().detach().clone(), lam.detach().clone()
