"""How many bits the keys and the values of each layer get, so that a model loses least under one budget.

Layers differ by a hundredfold in what an error of theirs costs, and keys differ from values. What a recipe loses at
every width of every layer and side is predicted from gradients (kv4.evaluate.sensitivity) on a calibration text, as a
table; widths are then bought where a bit saves most (kv4.evaluate.widths). Rotation, means and scales stay as they are;
lambda comes from the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kv4.calibration import Calibration
from kv4.evaluate.calibrate import Layer
from kv4.evaluate.calibration import lambda_from_energies
from kv4.evaluate.sensitivity import Rows, sensitivities
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.variant import Variant, from_recipe
from kv4.evaluate.widths import WIDTHS, allocate
from kv4.recipe import PACKED_WIDTHS, Recipe

Tensor = torch.Tensor
BUDGETS = (2.5, 3.25, 4.25)
_OWN = Recipe()


def head_dim(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.inference_mode()
def losses(
    windows: Sequence[Sequence[Rows]],
    variant: Variant,
    calibration: Calibration | None = None,
    widths: Sequence[int] = WIDTHS,
) -> Tensor:
    """Expected KL divergence, nats per token, float64 [2, layers, widths]: of keys (0) and of values (1) of each layer
    sealed as `variant` says but in so many bits, all else exact; mean over windows of Rows of every layer. calibration:
    what the variant needs, or None."""
    found = torch.zeros(2, len(windows[0]), len(widths), dtype=torch.float64)
    for at, bits in enumerate(widths):
        session = _Session(variant.replace(both__bits=bits, widths=()), calibration, None)
        for layers in windows:
            for layer, rows in enumerate(layers):
                parts = rows.divergence(*seal_layer(session, layer, rows.query, rows.key, rows.value))
                found[:, layer, at] += torch.tensor(parts, dtype=torch.float64) / len(windows)
    return found


def lambdas(windows: Sequence[Sequence[Rows]]) -> dict[str, Tensor]:
    """Lambda of every layer's keys, by its name in a Calibration."""
    found = {}
    for index in range(len(windows[0])):
        moments = [Layer(x.query, x.key, x.value).second_moments() for x in (layers[index] for layers in windows)]
        energies = (torch.stack(some).mean(0).diagonal(dim1=-2, dim2=-1) for some in zip(*moments, strict=True))
        found[f"layer.{index}.key.lambda"] = lambda_from_energies(*energies).float()
    return found


def smoothed(table: Tensor) -> Tensor:
    """The table [2, layers, widths] as a layer's share times what a width costs, the same for all layers of a side:
    one draw of rounding errors at one width tells little, all widths together more."""
    logs = table.clamp(min=1e-300).log()
    share = (logs - logs.mean(1, keepdim=True)).mean(2, keepdim=True).exp()
    return share * table.sum(1, keepdim=True) / share.sum(1, keepdim=True)


def layer_widths(
    table: Tensor, budget: float, variant: Variant, dims: tuple[int, int], widths: Sequence[int] = WIDTHS
) -> tuple[tuple[int, int], ...]:
    """(bits of keys, bits of values) of every layer of a table [2, layers, widths], so that `variant` with them takes
    at most `budget` bits a value, all-in, at head dims (keys, values). Errors: ValueError for a budget below the least
    width, and for key and value dims that differ."""
    if dims[0] != dims[1]:
        raise ValueError(f"head_dim: expected one for keys and values; got {dims[0]} and {dims[1]}")
    layers = table.shape[1]
    four, eight = (variant.replace(both__bits=n, widths=()).bits_per_value(*dims) for n in (4, 8))
    step = (eight - four) / 4  # more than a bit a value where channels are padded
    beside = four - 4 * step
    flat = smoothed(table).flatten(0, 1).tolist()
    try:
        found = allocate(flat, (budget - beside) / step * 2 * layers, widths)
    except ValueError:
        least = beside + step * min(widths)
        raise ValueError(f"bits: expected a budget of at least {least:.3f} bits a value; got {budget:g}") from None
    return tuple(zip(found[:layers], found[layers:], strict=True))


def calibrate(
    model: Any,
    windows: Sequence[Tensor],
    *,
    bits: Sequence[float] = BUDGETS,
    variant: Variant | None = None,
    recipe: Recipe | None = None,
    refined: int = 0,
    most: int = max(PACKED_WIDTHS),
    identity: dict[str, Any] | None = None,
    text: str = "",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Lambda, and widths of every layer for each of `bits`, all-in per value, from windows of ids [1, T]. variant: what
    they are for; if not given, `recipe` (kv4's own) with `refined` keys a page, and the packed cache's widths up to
    `most`. Errors: ValueError."""
    if not windows:
        raise ValueError("windows: expected at least 1; got 0")
    taken = []
    for seed, ids in enumerate(windows):
        taken.append(sensitivities(model, ids, seed))
        if progress:
            progress(ids.shape[1])
    tokens = sum(ids.shape[1] for ids in windows)
    about = {"identity": identity, "text": text, "tokens": tokens}
    if variant is None:
        widths = [width for width in PACKED_WIDTHS if width <= most]
        used = from_recipe(recipe or Recipe()).replace(refined=refined)
        return from_rows(taken, bits, used, head_dim(model), widths, recipe=recipe or Recipe(), **about)
    return from_rows(taken, bits, variant, head_dim(model), **about)


def from_rows(
    windows: Sequence[Sequence[Rows]],
    bits: Sequence[float],
    variant: Variant,
    head_dim: int,
    widths: Sequence[int] = WIDTHS,
    *,
    recipe: Recipe = _OWN,
    identity: dict[str, Any] | None = None,
    text: str = "",
    tokens: int = 0,
) -> Calibration:
    """`calibrate` from what is already measured; widths: those there are; recipe: the calibration's."""
    tensors = lambdas(windows)
    made = Calibration(
        tensors, recipe, identity or {}, text, tokens, method="layers", budgets=tuple(bits), refined=variant.refined
    )
    table = losses(windows, variant, made, widths)
    chosen = [layer_widths(table, budget, variant, (head_dim, head_dim), widths) for budget in bits]
    for layer in range(table.shape[1]):
        tensors[f"layer.{layer}.widths"] = torch.tensor([found[layer] for found in chosen], dtype=torch.float32)
    return made
