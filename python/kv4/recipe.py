"""How keys and values become codes, and which tokens stay exact."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

from kv4 import _core
from kv4.messages import whole_number
from kv4.whole import file_path, written_whole

_FORMAT = "kv4-recipe"
_FORMAT_VERSION = 1
PACKED_WIDTHS = (2, 3, 4, 6, 8)  # bits of a code that pages hold
MOST_REFINED = 2
# (bits of keys, bits of values), each with one more step of the side where a bit saves most: a bit less makes an error
# 3.6 to 4 times as large, and the same width loses some four times as much on keys as on values (docs/quality.md).
_CHOICES = ((2, 2), (3, 2), (4, 2), (4, 3), (4, 4), (6, 4), (6, 6), (8, 6), (8, 8))


@dataclasses.dataclass(frozen=True)
class Side:
    """Sealing of one side, keys or values.

    rotation: "srft" (real FFT of the sign-flipped vector), "srht", "householder", "dense" (a learned
        matrix handed to the cache) or "identity". reflectors: Householder only, 0 means head_dim / 2.
    seed: of the rotation's signs or reflectors; the same seed gives the same rotation on every machine.
    group: channels per scale, 0 for the whole vector, else 128, 64 or 32.
    bits: of a code, 2, 3, 4, 6 or 8: on a CUDA device 2 to 4, on an Apple GPU 4.
    levels: "lloyd_max" (of a Gaussian), "uniform" (-7 ... 7, of 4 bits) or "trellis" (of 2 to 4 bits, each with two
        bits of the code before it: 3/4 of lloyd_max's squared error at 2 bits, 2/3 at 3 and 4; on the CPU, with
        seal="page" and scale="least_squares"). scale: "least_squares" or "abs_max".
    mean: keys only, subtract the page's mean. lambda_: "auto" (keys only), "given" or "none".
    """

    rotation: Literal["srft", "srht", "householder", "dense", "identity"] = "srft"
    reflectors: int = 0
    seed: int = 0x6B7634
    group: int = 0
    bits: int = 4
    levels: Literal["lloyd_max", "uniform", "trellis"] = "lloyd_max"
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
    bits: a budget, bits a value, all-in, in place of the sides' own, from which widths follow once head dims are known
        (`at`): Recipe(bits=3.25). Keys have more than values; where a budget lies between two choices, some layers of
        a kv4.hf.KV4Cache have the wider one. Widths measured for a model are those of `kv4 calibrate --method layers`.
    Raises ValueError naming the field for anything out of range or contradictory.
    """

    key: Side = Side(mean=True, lambda_="auto")
    value: Side = Side()
    seal: Literal["page", "arrival", "never"] = "page"
    sinks: int = 4
    window: int = 64
    refined: int = 0
    bits: float | None = None

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            side = getattr(self, name)
            if not isinstance(side, Side):
                raise ValueError(f"recipe.{name}: expected a kv4.Side; got {type(side).__name__}")
        _core.validate(self)
        if self.bits is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        if type(self.bits) not in (int, float) or not 2 <= self.bits <= 9:
            raise ValueError(f"recipe.bits: expected bits a value, all-in, from 2 to 9; got {self.bits!r}")
        for name, side in (("key", self.key), ("value", self.value)):
            if side.bits != Side.bits:
                raise ValueError(
                    f"recipe.bits: expected without bits of a side; got recipe.{name}.bits {side.bits} too"
                )
            if side.levels == "uniform":
                raise ValueError(
                    f"recipe.bits: expected with lloyd_max or trellis levels; got recipe.{name}.levels uniform"
                )
        if self.seal == "never":
            raise ValueError("recipe.bits: expected with a recipe that seals; got recipe.seal never")

    def at(self, head_dim: int, head_dim_v: int | None = None, layer: int = 0, layers: int = 1) -> Recipe:
        """The recipe of one layer of `layers`, with widths in place of a budget: all layers together take at most
        `bits`, and as much of it as widths allow. Itself where it has no budget. head_dim_v: of values, if it is not
        the keys'. Raises ValueError for a budget below what the least widths take."""
        if self.bits is None:
            return self
        head_dim, head_dim_v = _dims(head_dim, head_dim_v)
        choices = [self.with_bits(*pair) for pair in _CHOICES]
        costs = [choice.bits_per_value(head_dim, head_dim_v) for choice in choices]
        within = [place for place, cost in enumerate(costs) if cost <= self.bits]
        if not within:
            dims = head_dim if head_dim_v == head_dim else f"{head_dim} and {head_dim_v}"
            raise ValueError(f"recipe.bits: expected at least {costs[0]:g} at head dim {dims}; got {self.bits:g}")
        place = within[-1]
        if place + 1 < len(costs):
            wider = int(layers * (self.bits - costs[place]) / (costs[place + 1] - costs[place]) + 1e-9)
            place += (layer + 1) * wider // layers - layer * wider // layers  # spread evenly
        return choices[place]

    def with_bits(self, key: int, value: int) -> Recipe:
        """The same with codes of so many bits; `Recipe().with_bits(4, 3)` takes 3.75 bits a value at head dim 128. A
        side of a trellis keeps it up to 4 bits; wider codes have lloyd_max levels."""
        if self.bits is None and (key, value) == (self.key.bits, self.value.bits):
            return self

        def side(given: Side, bits: int) -> Side:
            levels = "lloyd_max" if given.levels == "trellis" and bits > 4 else given.levels
            return dataclasses.replace(given, bits=bits, levels=levels)

        sides = {"key": side(self.key, key), "value": side(self.value, value)}
        return dataclasses.replace(self, **sides, bits=None)

    def bits_per_value(self, head_dim: int, head_dim_v: int | None = None) -> float:
        """What a sealed page takes on the CPU for each key and value of its tokens, all-in: codes, scales, means,
        second rows, and what rounding to whole lines of 64 bytes adds. head_dim_v: of values, if it is not the keys'.
        16 for a recipe that never seals. Raises NotImplementedError for head dims that pages do not serve."""
        return self._bits_per_value(*_dims(head_dim, head_dim_v))

    @functools.cache  # noqa: B019  recipes are few, and compared by value
    def _bits_per_value(self, d_k: int, d_v: int) -> float:
        if self.seal == "never":
            return 16.0
        if self.bits is not None:
            return self.at(d_k, d_v).bits_per_value(d_k, d_v)
        # Rotations and lambda take no bytes of a page, and pages of every way of sealing are alike.
        key, value = (
            Side(rotation="identity", group=x.group, bits=x.bits, levels=x.levels, mean=x.mean)
            for x in (self.key, self.value)
        )
        sized = Recipe(key, value, refined=self.refined)
        page = _core.PageFormat(sized, dtype="float32", kv_heads=1, head_dim_k=d_k, head_dim_v=d_v)
        return 8 * page.head_bytes / (_core.PAGE_TOKENS * (d_k + d_v))

    @classmethod
    def paper(cls, lambda_: Literal["none", "given"] = "none") -> Recipe:
        """The recipe of arXiv 2605.05699: SRFT, per-channel lambda, abs-max scale, uniform int4 levels;
        every vector is sealed as it arrives. lambda_="given" takes a learned lambda from the cache's caller."""
        side = Side(levels="uniform", scale="abs_max", lambda_=lambda_)
        return cls(key=side, value=dataclasses.replace(side, lambda_="none"), seal="arrival", sinks=0, window=0)

    @classmethod
    def trellis(cls, refined: int = 0) -> Recipe:
        """kv4's own with the levels of a trellis on both sides: two thirds of its squared error at the same bits. On
        the CPU; attention takes as long with AVX-512 VBMI, longer on other processors. refined: as Recipe's."""
        own = cls()
        key, value = (dataclasses.replace(side, levels="trellis") for side in (own.key, own.value))
        return cls(key=key, value=value, refined=refined)

    @classmethod
    def exact(cls) -> Recipe:
        """Never seals: every token keeps the model's own dtype; any head dim."""
        side = Side(rotation="identity")
        return cls(key=side, value=side, seal="never", sinks=0, window=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. Sides of 4 bits and recipes without refined keys or a budget do not say so: what reads such a
        recipe need not know of others."""
        fields = dataclasses.asdict(self)
        if fields["refined"] == 0:
            del fields["refined"]
        if fields["bits"] is None:
            del fields["bits"]
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
        """Writes JSON. An interrupted write leaves the file that was there. Errors: OSError."""
        with written_whole(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Reads what `to_file` wrote. Raises OSError, or ValueError naming the entry."""
        file = file_path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"path: expected a recipe in JSON; got {path} ({e})") from None
        return cls.from_dict(data)


def _dims(head_dim: Any, head_dim_v: Any) -> tuple[int, int]:
    d_k = whole_number("head_dim", head_dim)
    return d_k, d_k if head_dim_v is None else whole_number("head_dim_v", head_dim_v)


def _known(kind: type, values: Any, where: str) -> dict[str, Any]:
    """`values` if they are a dict of fields of `kind` with the types of its defaults."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object; got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where}.{name}: expected one of {', '.join(fields)}; got an unknown field")
        default = fields[name].default
        if default is None:
            continue  # __post_init__ checks it
        if type(value) is not type(default):
            raise ValueError(f"{where}.{name}: expected {type(default).__name__}; got {value!r}")
    return values
