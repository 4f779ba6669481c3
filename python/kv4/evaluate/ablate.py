"""The whole table of `kv4 ablate`: rows, what they need first, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv4.calibration import Calibration, load
from kv4.evaluate.calibrate import Errors, Layer, calibrate, capture, errors
from kv4.evaluate.design import Design, bits_per_value, design_from
from kv4.evaluate.laboratory import _Session, seal_layer
from kv4.evaluate.learn import learn
from kv4.evaluate.quality import Candidate, Quality, measure_all
from kv4.evaluate.rows import Row
from kv4.evaluate.scores import paired
from kv4.evaluate.sensitivity import Rows, predicted, sensitivities
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
        wanted = [needs, row.design, row.variant.mixed] if row.variant.mixed else needs
        key = digest([self.identity.get("digest"), wanted, [digest(ids) for ids in self.windows]])
        if key not in self._made:
            file = self.scratch / f"{key}.safetensors"
            if not file.is_file():
                self._make(row).save(file)
            self._made[key] = load(file)
        return self._made[key]

    def _make(self, row: Row) -> Calibration:
        needs = row.needs
        about = {"identity": self.identity, "text": self.text}
        if needs == "mixed":
            return design_from(self.gradients, bits=(row.variant.mixed,), options=Design(**dict(row.design)), **about)
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
    candidates = [Candidate(row.name, row.variant, calibrations.get(row)) for row in rows]
    qualities = measure_all(
        model, windows, candidates, state=state, identity=identity, scratch=scratch, progress=progress, found=found
    )
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    results = []
    for row, candidate in zip(rows, candidates, strict=True):
        key = State.key(
            kind="errors", model=identity.get("digest"), window=digest(calibrations.windows[0]), **candidate.key()
        )
        if (kept := state.get(key)) is None:
            measured = errors(calibrations.layers, row.variant, candidate.calibration)
            state.put(key, name=row.name, errors=vars(measured))
        else:
            measured = Errors(**kept["errors"])
        bits = _bits(row, candidate.calibration, head_dim)
        quality = qualities[row.name]
        base = qualities.get("kv4")
        difference = None if base is None or row.name == "kv4" else paired(quality.scores, base.scores)
        results.append(Result(row, quality, measured, bits, difference))
    return results


def _bits(row: Row, calibration: Calibration | None, head_dim: int) -> float:
    if row.variant.mixed and calibration is not None:
        return bits_per_value(calibration, row.variant.mixed)
    return row.variant.bits_per_value(head_dim, head_dim)


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
        made = [calibrations.get(row) for row in rows]
    sums = [[0.0, 0.0] for _ in rows]
    sessions = [_Session(row.variant, calibration, None) for row, calibration in zip(rows, made, strict=True)]
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
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [
        Prediction(row, _bits(row, calibration, head_dim), *sum_)
        for row, calibration, sum_ in zip(rows, made, sums, strict=True)
    ]
