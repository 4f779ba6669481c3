"""Measuring what a calibration holds: second moments of queries and keys, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kv4._core import PAGE_TOKENS
from kv4.calibration import Calibration
from kv4.evaluate.calibration import lambda_from_energies, score_transform
from kv4.evaluate.rotations import rotation
from kv4.evaluate.simulation import _Session, seal_layer, simulated
from kv4.evaluate.variant import Variant
from kv4.recipe import Recipe

Tensor = torch.Tensor
METHODS = ("lambda", "transform")


@dataclass
class Layer:
    """One layer's keys and values [kv_heads, T, d] and queries [q_heads, T, d] of one window."""

    query: Tensor
    key: Tensor
    value: Tensor

    def second_moments(self, page: int = PAGE_TOKENS, sinks: int = 4) -> tuple[Tensor, Tensor]:
        """(S_q, S_k), float64 [kv_heads, d, d]: E q q^T over the heads of a group, and E (k - mu)(k - mu)^T with mu the
        mean of each page; the first `sinks` keys, which no page holds, are left out."""
        heads, _, d = self.key.shape
        q = self.query.double().reshape(heads, -1, d)
        keys = self.key[:, sinks:].double()
        centred = torch.cat([block - block.mean(1, keepdim=True) for block in keys.split(page, 1)], 1)
        return q.mT @ q / q.shape[1], centred.mT @ centred / centred.shape[1]


@torch.inference_mode()
def capture(model: Any, ids: Tensor) -> list[Layer]:
    """Queries, keys and values of every attention layer, from one exact forward over ids [1, T]."""
    found: dict[int, Layer] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        found[layer] = Layer(*(x.contiguous().clone() for x in (query, key, value)))

    with simulated(model, observer=observe):
        model.get_decoder()(input_ids=ids, use_cache=False)
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"model: expected attention in every layer; got it in layers {sorted(found)}")
    return [found[i] for i in range(len(found))]


def calibrate(
    model: Any,
    windows: Sequence[Tensor],
    *,
    method: Literal["lambda", "transform"] = "lambda",
    recipe: Recipe | None = None,
    identity: dict[str, Any] | None = None,
    text: str = "",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Measures a model on windows of ids [1, T].

    lambda: per layer and KV head, (E q^2 / E (k - mu)^2)^(1/4); the recipe's keys then take it as given.
    transform: besides, the matrix of least expected error of q.k (score_transform), one per layer, from moments summed
    over its KV heads, with the recipe's rotation after it; keys then take it as a dense rotation, with no lambda.
    Query moments come along for both. Errors: ValueError.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if not windows:
        raise ValueError("windows: expected at least 1; got 0")
    recipe = recipe or Recipe()
    sums: list[tuple[Tensor, Tensor]] = []
    tokens = 0
    for ids in windows:
        for index, layer in enumerate(capture(model, ids)):
            moments = layer.second_moments(sinks=recipe.sinks)
            if index < len(sums):
                sums[index] = sums[index][0] + moments[0], sums[index][1] + moments[1]
            else:
                sums.append(moments)
        tokens += ids.shape[1]
        if progress:
            progress(ids.shape[1])
    tensors: dict[str, Tensor] = {}
    for index, (query, key) in enumerate(sums):
        query, key = query / len(windows), key / len(windows)
        tensors[f"layer.{index}.query.moments"] = query
        energies = [x.diagonal(dim1=-2, dim2=-1) for x in (query, key)]
        tensors[f"layer.{index}.key.lambda"] = lambda_from_energies(*energies)
        if method == "transform":
            d = key.shape[-1]
            side = recipe.key
            matrix = torch.from_numpy(rotation(side.rotation, d, side.seed, side.reflectors))
            tensors[f"layer.{index}.key.matrix"] = score_transform(_pooled(key), _pooled(query), matrix)[0]
    if method == "lambda":
        made_for = replace(recipe, key=replace(recipe.key, lambda_="given"))
    else:
        made_for = replace(recipe, key=replace(recipe.key, lambda_="none", rotation="dense", reflectors=0))
    return Calibration(
        tensors={name: x.float() for name, x in tensors.items()},
        recipe=made_for, model=identity or {}, text=text, tokens=tokens, method=method,
    )  # fmt: skip


def _pooled(moments: Tensor) -> Tensor:
    """One matrix for all KV heads, each with the same say: [1, d, d]."""
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-30)
    return (moments / trace).mean(0, keepdim=True)


@dataclass(frozen=True)
class Errors:
    """Of a variant on captured layers, as means over layers of relative errors.

    key, value: sum |x - x^|^2 / sum |x - mean x|^2. score: sum over queries and keys of (q.(k - k^))^2 over the same
    of q.(k - mean k), by the layer's second moments of q."""

    key: float
    value: float
    score: float


@torch.inference_mode()
def errors(layers: Sequence[Layer], variant: Variant, calibration: Calibration | None = None) -> Errors:
    """Quantisation errors of `variant`, sinks left out, every page sealed; masks and attention play no part."""
    session = _Session(variant, calibration, None)
    found = []
    body = variant.sinks if variant.chosen == "first" else 0
    for index, layer in enumerate(layers):
        keys, values = (x[:, body:].double() for x in (layer.key, layer.value))
        sealed_k, sealed_v = seal_layer(session, index, layer.query, layer.key, layer.value)
        moments = layer.second_moments()[0]
        key_error, value_error = keys - sealed_k, values - sealed_v
        spread_k, spread_v = (x - x.mean(1, keepdim=True) for x in (keys, values))

        def scores(x: Tensor, moments: Tensor = moments) -> float:
            return float(torch.einsum("hti,hij,htj->", x, moments, x))

        found.append(
            (
                float(key_error.square().sum() / spread_k.square().sum()),
                float(value_error.square().sum() / spread_v.square().sum()),
                scores(key_error) / scores(spread_k),
            )
        )
    return Errors(*(sum(part) / len(found) for part in zip(*found, strict=True)))
