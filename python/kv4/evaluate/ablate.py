"""The whole table of `kv4 ablate`: rows, what they need first, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv4.calibration import Calibration, load
from kv4.evaluate.calibrate import Errors, Layer, calibrate, capture, errors
from kv4.evaluate.learn import learn
from kv4.evaluate.quality import Candidate, Quality, measure_all
from kv4.evaluate.rows import Row
from kv4.evaluate.scores import paired
from kv4.evaluate.state import State, digest
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
        self._made: dict[str, Calibration] = {}

    @property
    def layers(self) -> list[Layer]:
        """Captured from the first tokens of the first window; quantisation errors are measured on them too."""
        if self._layers is None:
            self._layers = capture(self.model, self.windows[0][:, :_CAPTURED])
        return self._layers

    def get(self, needs: str) -> Calibration | None:
        if not needs:
            return None
        if needs not in self._made:
            name = digest([self.identity.get("digest"), needs, [digest(ids) for ids in self.windows]])
            file = self.scratch / f"{name}.safetensors"
            if not file.is_file():
                self._make(needs).save(file)
            self._made[needs] = load(file)
        return self._made[needs]

    def _make(self, needs: str) -> Calibration:
        about = {"identity": self.identity, "text": self.text}
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
    candidates = [Candidate(row.name, row.variant, calibrations.get(row.needs)) for row in rows]
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
        bits = row.variant.bits_per_value(head_dim, head_dim)
        quality = qualities[row.name]
        base = qualities.get("kv4")
        difference = None if base is None or row.name == "kv4" else paired(quality.scores, base.scores)
        results.append(Result(row, quality, measured, bits, difference))
    return results
