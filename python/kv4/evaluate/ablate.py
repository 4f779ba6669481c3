"""The whole table of `kv4 ablate`: rows, what they need first, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv4.calibration import Calibration, load
from kv4.evaluate.calibrate import Errors, Layer, calibrate, capture, errors
from kv4.evaluate.layers import from_rows, head_dim
from kv4.evaluate.learn import learn
from kv4.evaluate.quality import Candidate, Quality, measure_all
from kv4.evaluate.rows import Row
from kv4.evaluate.scores import paired
from kv4.evaluate.sensitivity import Rows, predicted, sensitivities
from kv4.evaluate.simulation import _Session, seal_layer
from kv4.evaluate.state import State, digest
from kv4.evaluate.variant import Variant
from kv4.recipe import Recipe

Tensor = torch.Tensor
_CAPTURED = 1024


@dataclass(frozen=True)
class Result:
    row: Row
    quality: Quality
    errors: Errors
    bits_per_value: float
    # KL divergence less that of the row kv4 on the same tokens, and its standard error; None without that row.
    difference: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.row.name, "group": self.row.group, "label": self.row.label,
            "bits_per_value": self.bits_per_value, "errors": vars(self.errors),
            "variant": self.row.variant.to_dict(), "quality": self.quality.to_dict(),
            "difference": self.difference,
        }  # fmt: skip


class Calibrations:
    """What rows need, made once from a calibration text and kept in `scratch`."""

    def __init__(
        self, model: Any, windows: Sequence[Tensor], identity: dict[str, Any], scratch: Path, text: str
    ) -> None:
        self.model, self.windows, self.identity, self.scratch, self.text = model, windows, identity, scratch, text
        self._layers: list[Layer] | None = None
        self._gradients: list[list[Rows]] | None = None
        self._made: dict[str, Calibration] = {}

    @property
    def layers(self) -> list[Layer]:
        """Captured from the first tokens of the first window; quantisation errors are measured on them too."""
        if self._layers is None:
            self._layers = capture(self.model, self.windows[0][:, :_CAPTURED])
        return self._layers

    @property
    def gradients(self) -> list[list[Rows]]:
        """Of every calibration window, layer by layer."""
        if self._gradients is None:
            self._gradients = [sensitivities(self.model, ids, seed) for seed, ids in enumerate(self.windows)]
        return self._gradients

    def get(self, row: Row) -> Calibration | None:
        needs = row.needs
        if not needs:
            return None
        wanted = [needs, row.budget, row.widths, row.variant.differences()] if needs == "layers" else needs
        key = digest([self.identity.get("digest"), wanted, [digest(ids) for ids in self.windows]])
        if key not in self._made:
            file = self.scratch / f"{key}.safetensors"
            if not file.is_file():
                self._make(row).save(file)
            self._made[key] = load(file)
        return self._made[key]

    def variant(self, row: Row) -> Variant:
        """The row's, with the widths of layers that its calibration has for it."""
        if row.needs != "layers":
            return row.variant
        found = self.get(row)
        assert found is not None
        return row.variant.replace(widths=found.widths_of(row.budget))

    def _make(self, row: Row) -> Calibration:
        needs = row.needs
        about = {"identity": self.identity, "text": self.text}
        if needs == "layers":
            return from_rows(self.gradients, (row.budget,), row.variant, head_dim(self.model), row.widths, **about)
        if needs == "moments":
            return calibrate(self.model, self.windows, method="lambda", **about)
        if needs == "transform":
            return calibrate(self.model, self.windows, method="transform", **about)
        trained = {
            "learned": {"after_srft": False},
            "learned_srft": {"after_srft": True},
            "learned_lambda": {"after_srft": True, "lambda_only": True},
        }
        return learn(self.layers, recipe=Recipe(), model=self.identity, **trained[needs])


def ablate(
    model: Any,
    windows: Sequence[Tensor],
    rows: Sequence[Row],
    calibrations: Calibrations,
    *,
    state: State,
    identity: dict[str, Any],
    scratch: Path | None = None,
    progress: Callable[[int], None] | None = None,
    found: Callable[[int, str, Any], None] | None = None,
) -> list[Result]:
    """Measures every row on `windows` of ids [1, T], the second halves scored, against the exact cache; the errors are
    those on the first calibration window. Resumes from `state`. Errors: ValueError for a row the model's head dims do
    not allow."""
    if not rows:
        raise ValueError("rows: expected at least 1; got 0")
    candidates = [Candidate(row.name, calibrations.variant(row), calibrations.get(row)) for row in rows]
    qualities = measure_all(
        model, windows, candidates, state=state, identity=identity, scratch=scratch, progress=progress, found=found
    )
    d = head_dim(model)
    results = []
    for row, candidate in zip(rows, candidates, strict=True):
        key = State.key(
            kind="errors", model=identity.get("digest"), window=digest(calibrations.windows[0]), **candidate.key()
        )
        if (kept := state.get(key)) is None:
            measured = errors(calibrations.layers, candidate.recipe, candidate.calibration)
            state.put(key, name=row.name, errors=vars(measured))
        else:
            measured = Errors(**kept["errors"])
        bits = candidate.recipe.bits_per_value(d, d)
        quality = qualities[row.name]
        base = qualities.get("kv4")
        difference = None if base is None or row.name == "kv4" else paired(quality.scores, base.scores)
        results.append(Result(row, quality, measured, bits, difference))
    return results


@dataclass(frozen=True)
class Prediction:
    """Expected KL divergence, nats per token, that errors of keys and of values cause, to second order."""

    row: Row
    bits_per_value: float
    key: float
    value: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.row.name, "group": self.row.group, "label": self.row.label,
            "bits_per_value": self.bits_per_value, "key": self.key, "value": self.value,
        }  # fmt: skip


@torch.inference_mode()
def predict(
    model: Any,
    windows: Sequence[Tensor],
    rows: Sequence[Row],
    calibrations: Calibrations,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Every row by one forward and one backward pass over each window of ids [1, T], whatever the number of rows.
    Only for rows that keep the sinks and the window of kv4's own recipe: elsewhere other keys are sealed."""
    base = Variant()
    for row in rows:
        if (row.variant.sinks, row.variant.window, row.variant.seal, row.variant.page, row.variant.chosen) != (
            base.sinks, base.window, base.seal, base.page, base.chosen
        ):  # fmt: skip
            raise ValueError(f"--predict: expected rows that seal what kv4 seals; got {row.name}")
    with torch.inference_mode(False):
        variants = [calibrations.variant(row) for row in rows]
        sessions = [_Session(v, calibrations.get(row), None) for row, v in zip(rows, variants, strict=True)]
    sums = [[0.0, 0.0] for _ in rows]
    for seed, ids in enumerate(windows):
        with torch.inference_mode(False):
            layers = sensitivities(model, ids, seed)
        for sum_, session in zip(sums, sessions, strict=True):

            def read(layer: int, x: Rows, session: _Session = session) -> tuple[Tensor, Tensor]:
                return seal_layer(session, layer, x.query, x.key, x.value)

            for side, part in enumerate(predicted([layers], read)):
                sum_[side] += part / len(windows)
            if progress:
                progress(ids.shape[1])
    d = head_dim(model)
    return [
        Prediction(row, variant.bits_per_value(d, d), *sum_)
        for row, variant, sum_ in zip(rows, variants, sums, strict=True)
    ]
