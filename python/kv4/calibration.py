"""A calibration: lambda and rotations of a model's layers, measured on a text and kept in one safetensors file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kv4.extras import require
from kv4.recipe import MOST_REFINED, PACKED_WIDTHS, Recipe
from kv4.whole import file_path, written_whole

require("kv4.calibration", "hf", "torch", "safetensors")

import torch

Tensor = torch.Tensor
FORMAT, FORMAT_VERSION = "kv4-calibration", 2
_WIDTHS_VERSION = 2  # files without widths of layers are written as version 1, which older readers take


def identity_of(folder: str | Path) -> dict[str, Any]:
    """Identifies a model: its name, and a digest of its configuration and of the weights' index."""
    folder = Path(folder)
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(size, 1 << 24)))
            stream.seek(max(0, file.stat().st_size - (1 << 16)))
            digest.update(stream.read())
    return {"name": folder.name, "digest": digest.hexdigest()[:32]}


@dataclass(eq=False)
class Calibration:
    """Per layer: lambda float32 [kv_heads, d], matrices [d, d] or [kv_heads, d, d], second moments of queries
    [kv_heads, d, d]. Keys of `tensors` are "layer.3.key.lambda", "layer.3.key.matrix", "layer.3.query.moments"...

    With widths of layers, "layer.3.widths" [budgets, 2]: bits of a key's code and of a value's (kv4.evaluate.layers)
    for each of `budgets`, bits a value, all-in, beside `refined` tokens a page whose keys have a second row of codes
    (Recipe.refined).

    recipe: what it was made for. model: of identity_of. text, tokens: what it was measured on. method: how."""

    tensors: dict[str, Tensor]
    recipe: Recipe
    model: dict[str, Any]
    text: str = ""
    tokens: int = 0
    method: str = "moments"
    versions: dict[str, str] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    refined: int = 0

    def lambda_of(self, side: str, layer: int) -> Tensor:
        return self._get(f"layer.{layer}.{side}.lambda")

    def matrix_of(self, side: str, layer: int) -> Tensor:
        return self._get(f"layer.{layer}.{side}.matrix")

    def query_moments(self, layer: int) -> Tensor:
        return self._get(f"layer.{layer}.query.moments")

    def widths_of(self, budget: float) -> tuple[tuple[int, int], ...]:
        """(bits of keys, bits of values) of every layer. Errors: ValueError for a budget that it has not."""
        if budget not in self.budgets:
            known = ", ".join(f"{b:g}" for b in self.budgets) or "none (kv4 calibrate --method layers makes them)"
            raise ValueError(f"bits: expected a budget of the calibration, {known}; got {budget:g}")
        rows = (self._get(f"layer.{layer}.widths")[self.budgets.index(budget)] for layer in range(self.layers))
        return tuple((int(key), int(value)) for key, value in rows)

    def _get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"calibration: expected an entry {name}; got none (made by {self.method!r})")
        return self.tensors[name]

    @property
    def layers(self) -> int:
        return 1 + max((int(name.split(".")[1]) for name in self.tensors), default=-1)

    @property
    def packed_recipe(self) -> Recipe:
        """`recipe` with the refined keys that widths of layers were chosen for. Errors: ValueError for more than a
        recipe may have."""
        return dataclasses.replace(self.recipe, refined=self.refined) if self.budgets else self.recipe

    def why_not_packed(self, budget: float | None = None) -> str | None:
        """What of this the packed cache does not have; None where it has all of it."""
        if self.method == "oscar":
            return "rotations of OSCAR's recipe"
        if self.refined > MOST_REFINED:
            return f"{self.refined} refined tokens a page"
        widths = {x for each in self.budgets if budget in (None, each) for pair in self.widths_of(each) for x in pair}
        others = sorted(widths - set(PACKED_WIDTHS))
        return f"widths of {', '.join(map(str, others))} bits" if others else None

    def arguments(self, budget: float | None = None) -> dict[str, Any]:
        """What kv4.hf.attach and KV4Cache take: recipe and lambda_k, and lambda_v and matrices where there are any;
        with widths of layers, `bits` of the budget, which need not be named where there is one only.
        Errors: ValueError for a budget that there is not, and for what can only be simulated."""
        if self.budgets and budget is None and len(self.budgets) == 1:
            budget = self.budgets[0]
        if (self.budgets and budget is None) or (budget is not None and not self.budgets):
            known = ", ".join(f"{b:g}" for b in self.budgets) or "none: it has no widths of layers"
            raise ValueError(f"bits: expected a budget of the calibration, {known}; got {budget}")
        if (got := self.why_not_packed(budget)) is not None:
            raise ValueError(f"calibration: expected what the packed cache has; got {got}")
        found: dict[str, Any] = {"recipe": self.packed_recipe}
        if budget is not None:
            found["bits"] = self.widths_of(budget)
        for argument, side, what in (
            ("lambda_k", "key", "lambda"), ("lambda_v", "value", "lambda"),
            ("matrix_k", "key", "matrix"), ("matrix_v", "value", "matrix"),
        ):  # fmt: skip
            recipe = getattr(self.recipe, side)
            wanted = recipe.lambda_ == "given" if what == "lambda" else recipe.rotation == "dense"
            names = [f"layer.{layer}.{side}.{what}" for layer in range(self.layers)]
            if wanted:
                found[argument] = [self._get(name).float() for name in names]
        return found

    def check_model(self, folder: str | Path) -> None:
        """ValueError unless it was measured on the model in `folder`."""
        here = identity_of(folder)
        if here["digest"] != self.model.get("digest"):
            raise ValueError(
                f"calibration: expected one of this model ({here['name']}, {here['digest'][:8]}); got one of "
                f"{self.model.get('name')}, {str(self.model.get('digest'))[:8]}"
            )

    def save(self, path: str | Path) -> None:
        """In a folder that is made if there is none. An interrupted write leaves the file that was there.
        Errors: OSError."""
        from safetensors.torch import save

        meta = {
            "format": FORMAT,
            "version": str(_WIDTHS_VERSION if self.budgets else 1),
            "recipe": json.dumps(self.recipe.to_dict()),
            "model": json.dumps(self.model),
            "text": self.text,
            "tokens": str(self.tokens),
            "method": self.method,
            "versions": json.dumps(self.versions or versions()),
        }
        if self.budgets:
            meta |= {"budgets": json.dumps(self.budgets), "refined": str(self.refined)}
        file_path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(save({name: x.float().contiguous() for name, x in self.tensors.items()}, meta))


def versions() -> dict[str, str]:
    found = {}
    for name in ("kv4", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load(path: str | Path, model: str | Path | None = None) -> Calibration:
    """Reads a calibration, and checks it against the model in the folder `model` if that is given.
    Errors: OSError; ValueError naming what was expected and what came."""
    from safetensors import SafetensorError, safe_open

    path = file_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"calibration: expected a file; got {path}")
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"calibration: expected a safetensors file; got {path} ({error})") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"calibration: expected format '{FORMAT}'; got {meta.get('format')!r} in {path}")
    if meta.get("version") not in ("1", str(FORMAT_VERSION)):
        raise ValueError(f"calibration: expected version 1 or {FORMAT_VERSION}; got {meta.get('version')!r}")
    try:
        found = Calibration(
            tensors=tensors,
            recipe=Recipe.from_dict(json.loads(meta["recipe"])),
            model=dict(json.loads(meta["model"])),
            text=meta.get("text", ""),
            tokens=int(meta.get("tokens", 0)),
            method=meta.get("method", ""),
            versions=json.loads(meta.get("versions", "{}")),
            budgets=tuple(float(b) for b in json.loads(meta.get("budgets", "[]"))),
            refined=int(meta.get("refined", 0)),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"calibration: expected what it was made for and from; got {path} ({error})") from None
    for name, x in found.tensors.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"calibration: expected finite numbers; got NaN or infinity in {name}")
        if name.endswith(".lambda") and not bool((x > 0).all()):
            raise ValueError(f"calibration: expected positive lambda; got {float(x.min())} in {name}")
    _check_widths(found)
    if model is not None:
        found.check_model(model)
    return found


def _check_widths(found: Calibration) -> None:
    """ValueError unless every layer has widths of 2 to 8 bits for every budget, and no file without budgets has any."""
    named = [name for name in found.tensors if name.endswith(".widths")]
    if not found.budgets:
        if named:
            raise ValueError(f"calibration: expected budgets beside {named[0]}; got none")
        return
    if not 0 <= found.refined <= 4:
        raise ValueError(f"calibration: expected 0 to 4 refined tokens; got {found.refined}")
    for layer in range(found.layers):
        widths = found._get(f"layer.{layer}.widths")
        if widths.shape != (len(found.budgets), 2):
            raise ValueError(
                f"calibration: expected layer.{layer}.widths [{len(found.budgets)}, 2]; got {list(widths.shape)}"
            )
        if not bool(((widths == widths.round()) & (widths >= 2) & (widths <= 8)).all()):
            raise ValueError(f"calibration: expected widths of 2 to 8 bits; got others in layer.{layer}.widths")
