"""How keys and values become codes, and which tokens stay exact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from kv4 import _core
from kv4.whole import file_path

_FORMAT = "kv4-recipe"
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Side:
    """Sealing of one side, keys or values.

    rotation: "srft" (real FFT of the sign-flipped vector), "srht", "householder", "dense" (a learned
        matrix handed to the cache) or "identity". reflectors: Householder only, 0 means head_dim / 2.
    seed: of the rotation's signs or reflectors; the same seed gives the same rotation on every machine.
    group: channels per scale, 0 for the whole vector, else 128, 64 or 32.
    bits: of a code, 2, 3, 4, 6 or 8; others than 4 on the CPU (kv4.Cache, kv4.hf).
    levels: "lloyd_max" (of a Gaussian) or "uniform" (-7 ... 7, of 4 bits). scale: "least_squares" or "abs_max".
    mean: keys only, subtract the page's mean. lambda_: "auto" (keys only), "given" or "none".
    """

    rotation: Literal["srft", "srht", "householder", "dense", "identity"] = "srft"
    reflectors: int = 0
    seed: int = 0x6B7634
    group: int = 0
    bits: int = 4
    levels: Literal["lloyd_max", "uniform"] = "lloyd_max"
    scale: Literal["least_squares", "abs_max"] = "least_squares"
    mean: bool = False
    lambda_: Literal["none", "auto", "given"] = "none"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole cache's recipe; `Recipe()` is kv4's own.

    seal: "page" (whole pages of 64 tokens once they leave the exact window), "arrival" (every vector as
        it arrives, before attention sees it) or "never" (an exact cache).
    sinks: first tokens of a sequence, kept exact. window: newest tokens kept exact.
    refined: keys of a page, 0 to 2, those of the tokens with the least value vectors, that have a second row of 4-bit
        codes for what the first one left: .03 bits a value each at head dims 128 and 256, before rounding a page's part
        of a head up to 64 bytes. Other than 0 on the CPU (kv4.Cache, kv4.hf), with seal="page".
    Raises ValueError naming the field for anything out of range or contradictory.
    """

    key: Side = Side(mean=True, lambda_="auto")
    value: Side = Side()
    seal: Literal["page", "arrival", "never"] = "page"
    sinks: int = 4
    window: int = 64
    refined: int = 0

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            side = getattr(self, name)
            if not isinstance(side, Side):
                raise ValueError(f"recipe.{name}: expected a kv4.Side; got {type(side).__name__}")
        _core.validate(self)

    def with_bits(self, key: int, value: int) -> Recipe:
        """The same with codes of so many bits; `Recipe().with_bits(4, 3)` takes 3.75 bits a value at head dim 128."""
        if (key, value) == (self.key.bits, self.value.bits):
            return self
        sides = {"key": dataclasses.replace(self.key, bits=key), "value": dataclasses.replace(self.value, bits=value)}
        return dataclasses.replace(self, **sides)

    @classmethod
    def paper(cls, lambda_: Literal["none", "given"] = "none") -> Recipe:
        """The recipe of arXiv 2605.05699: SRFT, per-channel lambda, abs-max scale, uniform int4 levels;
        every vector is sealed as it arrives. lambda_="given" takes a learned lambda from the cache's caller."""
        side = Side(levels="uniform", scale="abs_max", lambda_=lambda_)
        return cls(key=side, value=dataclasses.replace(side, lambda_="none"), seal="arrival", sinks=0, window=0)

    @classmethod
    def exact(cls) -> Recipe:
        """Never seals: every token keeps the model's own dtype; any head dim."""
        side = Side(rotation="identity")
        return cls(key=side, value=side, seal="never", sinks=0, window=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. Sides of 4 bits and recipes without refined keys do not say so: what reads such a recipe need
        not know of others."""
        fields = dataclasses.asdict(self)
        if fields["refined"] == 0:
            del fields["refined"]
        for side in (fields["key"], fields["value"]):
            if side["bits"] == 4:
                del side["bits"]
        return {"format": _FORMAT, "version": _FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises ValueError naming the first unknown or malformed entry."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"recipe.format: expected '{_FORMAT}'; got {got!r}")
        if data.get("version") != _FORMAT_VERSION:
            raise ValueError(f"recipe.version: expected {_FORMAT_VERSION}; got {data.get('version')!r}")
        fields = {k: v for k, v in data.items() if k not in ("format", "version")}
        for name in ("key", "value"):
            if name in fields:
                fields[name] = Side(**_known(Side, fields[name], f"recipe.{name}"))
        return cls(**_known(cls, fields, "recipe"))

    def to_file(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Reads what `to_file` wrote. Raises OSError, or ValueError naming the entry."""
        file = file_path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"path: expected a recipe in JSON; got {path} ({e})") from None
        return cls.from_dict(data)


def _known(kind: type, values: Any, where: str) -> dict[str, Any]:
    """`values` if they are a dict of fields of `kind` with the types of its defaults."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object; got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where}.{name}: expected one of {', '.join(fields)}; got an unknown field")
        default = fields[name].default
        if type(value) is not type(default):
            raise ValueError(f"{where}.{name}: expected {type(default).__name__}; got {value!r}")
    return values
