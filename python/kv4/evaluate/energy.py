"""Why a model's keys can or cannot be quantised: where their energy is, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kv4._core import PAGE_TOKENS
from kv4.evaluate.calibrate import Layer
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.variant import Variant, from_recipe
from kv4.recipe import Recipe


@dataclass(frozen=True)
class KeyEnergy:
    """mean: share of the keys' energy sum |k|^2 that lies in their mean over the window; page_mean: in the means of
    pages of 64. paper, kv4: root mean square error of a score, q.(k - k^) times the model's scale, in nats, over all
    queries and sealed keys; what all keys of a page share is left out, as softmax hardly sees it."""

    layer: int
    mean: float
    page_mean: float
    largest: float  # largest |mean| of a channel
    paper: float
    kv4: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def key_energy(layers: Sequence[Layer], scale: float) -> list[KeyEnergy]:
    """scale: what the model multiplies q.k with."""
    rows = []
    variants = (from_recipe(Recipe.paper()), Variant())
    for index, layer in enumerate(layers):
        keys = layer.key.double()
        total = keys.square().sum()
        mean = keys.mean(1)
        pages = list(keys.split(PAGE_TOKENS, 1))
        in_pages = sum(page.mean(1).square().sum() * page.shape[1] for page in pages)
        moments = layer.second_moments()[0]
        spread = []
        for variant in variants:
            sealed = seal_layer(_Session(variant, None, None), index, layer.query, layer.key, layer.value)[0]
            error = keys[:, variant.sinks :] - sealed.double()
            error = error - error.mean(1, keepdim=True)
            square = torch.einsum("hti,hij,htj->", error, moments, error) / error.shape[0] / error.shape[1]
            spread.append(scale * float(square.clamp(min=0).sqrt()))
        rows.append(
            KeyEnergy(
                index, float(mean.square().sum() * keys.shape[1] / total), float(in_pages / total),
                float(mean.abs().max()), *spread,
            )
        )  # fmt: skip
    return rows
