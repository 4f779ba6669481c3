"""The rows of `kv4 ablate`: each a recipe that differs from another in one thing."""

from __future__ import annotations

from dataclasses import dataclass

from kv4.evaluate.variant import SideVariant, Variant, by_layers, from_recipe, q4_0, q8_0
from kv4.evaluate.widths import WIDTHS
from kv4.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """needs: what must be measured or trained first: "moments", "transform", "learned", "learned_srft", "layers" or "".
    For "layers", what widths of layers are chosen by: budget, bits a value, all-in; widths, those there are."""

    name: str
    group: str
    label: str
    variant: Variant
    needs: str = ""
    budget: float = 0.0
    widths: tuple[int, ...] = WIDTHS


def layers() -> list[Row]:
    """Keys refined, and widths of their own for the keys and the values of every layer."""
    rows = [
        Row(f"refined-{n}", "layers", f"keys of {n} a page refined", Variant(refined=n)) for n in (1, 2)
    ]  # fmt: skip
    whole, trellis = by_layers(), Variant(refined=1).replace(both__levels="trellis")
    for budget in (4.25, 3.25, 2.5):
        for name, label, variant, widths in (
            ("", "", Variant(), WIDTHS),
            ("-refined", ", one key a page refined", Variant(refined=1), WIDTHS),
            ("-trellis", ", one key a page refined, a trellis", trellis, WIDTHS),
            ("-bytes", ", the same, lambda calibrated, best of 15 gains, scales and means in bytes", whole, WIDTHS),
            ("-no-5", ", as -bytes, no 5 bits", whole, (2, 3, 4, 6, 8)),
            ("-even", ", as -bytes, of 2, 4 and 8", whole, (2, 4, 8)),
        ):
            rows.append(
                Row(f"layers-{budget:g}{name}", "layers", f"widths of layers, {budget:g} bits{label}", variant,
                    "layers", budget, widths)
            )  # fmt: skip
    return rows


def steps() -> list[Row]:
    """From the paper's recipe to kv4's, one step after another, beside 8 bits."""
    paper = from_recipe(Recipe.paper())
    mean = paper.replace(key__mean="page")
    sinks = mean.replace(sinks=4)
    lam = sinks.replace(key__lambda_="auto")
    page = lam.replace(seal="page")
    fitted = page.replace(both__levels="lloyd_max", both__scale="least_squares")
    window = fitted.replace(window=64)
    assert window == Variant()
    token8 = SideVariant(rotation="identity", bits=8, levels="uniform", scale="abs_max")
    found = [
        ("q8_0", "8 bit, groups of 32 (like q8_0)", q8_0()),
        ("q8-token", "8 bit, one scale per token", Variant(token8, token8, "arrival", sinks=0, window=0)),
        ("q4_0", "4 bit, groups of 32, Hadamard (like q4_0)", q4_0()),
        ("paper", "the paper's SRFT, one scale per token", paper),
        ("step-mean", "+ page mean", mean),
        ("step-sinks", "+ 4 sinks", sinks),
        ("step-lambda", "+ lambda", lam),
        ("step-page", "+ exact open page", page),
        ("step-levels", "+ Lloyd-Max levels, least-squares scale", fitted),
        ("kv4", "+ window of 64 = kv4", window),
        ("3bit-w0", "kv4 at 3 bits, window 0", window.replace(both__bits=3, window=0)),
    ]
    return [Row(name, "steps", label, variant) for name, label, variant in found]


def ablations(head_dim: int) -> list[Row]:
    """kv4's recipe with one thing changed."""
    base = Variant()
    rows: list[Row] = []

    def add(group: str, name: str, label: str, needs: str = "", **changes: object) -> None:
        rows.append(Row(name, group, label, base.replace(**changes), needs))

    add("rotation", "rot-none", "no rotation", both__rotation="identity")
    add("rotation", "rot-srht", "SRHT", both__rotation="srht")
    add("rotation", "rot-haar", "Haar", both__rotation="haar")
    k = 1
    while k <= head_dim:
        add("rotation", f"rot-h{k}", f"Householder, k = {k}", both__rotation="householder", both__reflectors=k)
        k *= 4 if 4 * k < head_dim // 2 else 2
    for name, label in (("learned", "learned R and lambda"), ("learned_srft", "SRFT, then learned R and lambda")):
        change = {"both__rotation": "given", "both__lambda_": "given"}
        add("rotation", f"rot-{name.replace('_', '-')}", label, name, **change)

    add("mean", "mean-off", "no page mean", key__mean="none")
    for size in (16, 32, 128, 256):
        add("page", f"page-{size}", f"pages of {size}", page=size)
    for count in (0, 1, 16):
        add("sinks", f"sinks-{count}", f"{count} sinks", sinks=count)
    for count in (0, 128, 256):
        add("window", f"window-{count}", f"window of {count}", window=count)

    add("lambda", "lambda-none", "no lambda", key__lambda_="none")
    add("lambda", "lambda-calibrated", "lambda of a calibration text", "moments", key__lambda_="given")
    add("lambda", "lambda-learned", "lambda of least MSE (the paper's)", "learned_lambda", key__lambda_="given")
    add("lambda", "lambda-window", "lambda of the window itself (an oracle)", key__lambda_="window")
    add("lambda", "transform", "full matrix, optimal for q.k", "transform", key__lambda_="none", key__rotation="given")

    add("levels", "levels-uniform", "uniform levels", both__levels="uniform")
    add("levels", "levels-cubic", "cubic levels", both__levels="cubic")
    add("levels", "scale-absmax", "abs-max scale", both__scale="abs_max")
    add("levels", "levels-paper", "uniform levels, abs-max scale", both__levels="uniform", both__scale="abs_max")

    for size in (64, 32):
        add("groups", f"group-{size}", f"groups of {size}", both__group=size)
    both = ((2, 2), (3, 3), (8, 8))
    apart = ((3, 4), (4, 3), (2, 4), (4, 2), (5, 3), (5, 4), (8, 4), (4, 8), (16, 4), (4, 16))
    for key_bits, value_bits in both + apart:
        add("bits", f"k{key_bits}v{value_bits}", f"K {key_bits}, V {value_bits} bits", key__bits=key_bits,
            value__bits=value_bits)  # fmt: skip
    add("bits", "3bit-g16", "3 bits, groups of 16", both__bits=3, both__group=16)
    add("bits", "3bit-g32", "3 bits, groups of 32", both__bits=3, both__group=32)
    return rows


def trials() -> list[Row]:
    """Improvements that were tried."""
    base = Variant()
    found = [
        ("value-mean", "page mean for values too", "", base.replace(value__mean="page")),
        ("mean-group-16", "one mean for 16 channels", "", base.replace(key__mean="group", key__mean_group=16)),
        ("mean-group-4", "one mean for 4 channels", "", base.replace(key__mean="group", key__mean_group=4)),
        ("sinks-mass", "4 exact tokens a page, by attention mass", "", base.replace(chosen="mass")),
        ("sinks-68-w0", "68 sinks, window 0", "", base.replace(sinks=68, window=0)),
        ("sinks-36-w32", "36 sinks, window 32", "", base.replace(sinks=36, window=32)),
        ("rounding", "codes chosen for q.k", "moments", base.replace(key__rounding="moment")),
        ("rounding-calibrated", "codes chosen for q.k, calibrated lambda", "moments",
         base.replace(key__rounding="moment", key__lambda_="given")),
        ("rms", "steps from the rms alone", "", base.replace(both__scale="rms")),
        ("search", "best of 5 gains for each scale", "", base.replace(both__scale="search")),
        ("search-fine", "best of 15 gains", "", base.replace(both__scale="search_fine")),
        ("paper-after", "the paper's, own token exact", "", from_recipe(Recipe.paper()).replace(seal="after")),
        ("lambda-after", "+ mean, sinks, lambda, own token exact", "",
         base.replace(seal="after", window=0, both__levels="uniform", both__scale="abs_max")),
        ("trellis", "a trellis", "", base.replace(both__levels="trellis")),
        ("trellis-keys", "a trellis for keys", "", base.replace(key__levels="trellis")),
        ("trellis-values", "a trellis for values", "", base.replace(value__levels="trellis")),
        ("trellis-3", "a trellis, 3 bits", "", base.replace(both__levels="trellis", both__bits=3)),
        ("trellis-2", "a trellis, 2 bits", "", base.replace(both__levels="trellis", both__bits=2)),
        ("shrink-0.1", "energies drawn 10 % to their pairs", "", base.replace(key__shrink=0.1)),
        ("shrink-0.35", "energies drawn 35 % to their pairs", "", base.replace(key__shrink=0.35)),
        ("lambda-0.75", "lambda to the power 3/4", "", base.replace(key__damping=0.75)),
        ("lambda-1", "lambda itself, not to the power 0.9", "", base.replace(key__damping=1.0)),
        ("key-group-64", "groups of 64 for keys", "", base.replace(key__group=64)),
        ("value-group-64", "groups of 64 for values", "", base.replace(value__group=64)),
        ("k4v3-g32", "K 4 bits, V 3 bits in groups of 32", "", base.replace(value__bits=3, value__group=32)),
    ]  # fmt: skip
    return [Row(name, "trials", label, variant, needs) for name, label, needs, variant in found]


def all_rows(head_dim: int) -> list[Row]:
    return [*steps(), *ablations(head_dim), *trials(), *layers()]


def select(wanted: str, head_dim: int) -> list[Row]:
    """Rows by name or group, with commas between; "all" is every one. Errors: ValueError naming what is unknown."""
    every = all_rows(head_dim)
    if wanted == "all":
        return every
    names = [part.strip() for part in wanted.split(",") if part.strip()]
    known = {row.name for row in every} | {row.group for row in every}
    for name in names:
        if name not in known:
            groups = ", ".join(dict.fromkeys(row.group for row in every))
            raise ValueError(f"--rows: expected all, groups ({groups}) or names of rows; got {name!r}")
    return [row for row in every if row.name in names or row.group in names]
