"""`kv4 eval`: quality of caches compared with the exact cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kv4.cli import common, options
from kv4.cli.output import out, plain_errors, progress, table, write_json

PEERS = ("llama", "quanto", "hqq")


Calibrations = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="A file written by `kv4 calibrate`, with its own recipe. Repeatable."),
]
Budgets = Annotated[str | None, typer.Option(help="Budgets in bits per value, all-in, as for kv4 eval.")]
Refined = Annotated[
    list[int] | None,
    typer.Option(min=1, max=2, help="kv4's recipe with so many keys of a page refined, as one row more. Repeatable."),
]


class _DefaultGroup(TyperGroup):
    """`kv4 eval MODEL` is `kv4 eval quality MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["quality", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    help="Quality against the exact cache: [bold]kv4 eval MODEL[/] for KL divergence, top-1 agreement and perplexity.",
)


@app.command("quality")
@plain_errors
def quality(
    model: common.Model,
    text: common.Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows from the start of the text.")] = 10,
    length: common.Length = "2048",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="kv4 (default), trellis, paper, exact, a recipe file; q8_0, q4_0, int4-token: simulated. Repeatable."
        ),
    ] = None,
    calibration: Calibrations = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Budgets in bits per value, all-in, beside kv4, q8_0, q4_0, int4-token and paper: the widths of a "
            "calibration of kv4 calibrate --method layers, or, without one, Recipe(bits=...). --plot then draws KL "
            "against bits.",
        ),
    ] = None,
    refined: Refined = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="llama (llama.cpp's q8_0, q4_0), quanto or hqq (transformers' QuantizedCache). Repeatable."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Recipes by fake quantisation in one call: the same figures, faster.")
    ] = False,
    device: options.Device = "cpu",
    dtype: Annotated[
        options.DType | None,
        typer.Option(help="The model's dtype; float32 on the CPU, bfloat16 on CUDA.", show_default=False),
    ] = None,
    threads: options.Threads = None,
    state: common.StateFile = None,
    fresh: common.Fresh = False,
    json_: options.JsonFile = None,
    markdown: common.Markdown = None,
    plot: common.Plot = None,
) -> None:
    """KL divergence, top-1 agreement and perplexity against the model's own cache."""
    budgets = common.budgets(bits) if bits is not None else None
    if budgets is not None:
        recipe = recipe or ["kv4", "q8_0", "q4_0", "int4-token", "paper"]
    named = {name: common.recipe(name, simulate) for name in recipe or ([] if calibration or peer else ["kv4"])}
    tokens = common.whole(length, "--length", 4)
    for name in peer or []:
        if name not in PEERS:
            raise ValueError(f"--peer: expected one of {', '.join(PEERS)}; got {name!r}")
    if peer and device != "cpu":
        raise ValueError(f"--peer: expected with --device cpu only; got --device {device}")
    content, source = common.read_text(text)
    if "llama" in (peer or []):
        from kv4.bench.llama import require

        require()

    from kv4.evaluate import measure_all
    from kv4.evaluate.windows import cut

    calibrations = _loaded(calibration)
    kind = dtype or (options.DType.float32 if device == "cpu" else options.DType.auto)
    b = common.bench(model, kind, threads, state, fresh, device)

    parts = cut(b.tokenizer, content, windows, tokens)
    candidates = _candidates(named, refined, calibrations, budgets, b, simulate)
    found: dict[str, Any] = {}
    with progress(f"{windows} windows of {tokens:,} tokens", windows * tokens * len(candidates) or None) as advance:
        if candidates:
            found = measure_all(
                b.model, parts, candidates, state=b.state, identity=b.identity, scratch=b.scratch, progress=advance
            )
    for name in peer or []:
        found |= _peer(name, model, b, parts, threads)
    title = f"{model}: {windows} windows of {tokens:,} tokens of {source}, second halves scored"
    _show(found, title)
    if json_:
        write_json(
            {
                "model": b.identity, "text": source, "length": tokens, "windows": windows, "dtype": str(b.model.dtype),
                "device": options.device_title(b.model.device),
                "recipes": {c.name: c.to_dict() for c in candidates},
                "quality": {name: q.to_dict() for name, q in found.items()},
            },
            json_,
        )  # fmt: skip
    if markdown:
        from kv4.evaluate import report

        lines = report.markdown(report.HEADER, [report.quality_cells(name, q) for name, q in found.items()])
        common.write_markdown([f"{title}. {_errors_over(found)}", "", *lines], markdown)
    if plot:
        from kv4.evaluate import plots

        if budgets is None:
            plots.divergence(found, plot, title)
        else:
            points = [(c.name, _bits_of(c, b), found[c.name].kl, found[c.name].kl_se) for c in candidates]
            plots.by_bits(points, plot, title)
        common.say_plot(plot)


def _loaded(files: list[Path] | None) -> dict[Path, Any]:
    from kv4.calibration import load

    return {file: load(file) for file in files or []}


def _candidates(
    named: dict[str, Any],
    refined: list[int] | None,
    calibrations: dict[Path, Any],
    budgets: tuple[float, ...] | None,
    b: common.Bench,
    simulate: bool,
) -> list[Any]:
    """Recipes by name, refined keys, calibrations and budgets. Errors: ValueError for what a model does not have."""
    from kv4.evaluate import Candidate

    found = [Candidate(name, used) for name, used in named.items()]
    found += [Candidate(f"kv4, {n} refined", common.refined(n, simulate)) for n in refined or []]
    if budgets is not None and not any(loaded.budgets for loaded in calibrations.values()):
        found += [_budgeted(budget, b, simulate) for budget in budgets]
    for file, loaded in calibrations.items():
        loaded.check_model(b.folder)
        found += _calibrated(file.name, loaded, budgets, b, simulate)
    return found


def _calibrated(
    name: str, loaded: Any, budgets: tuple[float, ...] | None, b: common.Bench, simulate: bool
) -> list[Any]:
    """The candidates of one file. Errors: ValueError for what only a simulation has, where none is asked for."""
    from kv4.evaluate import Candidate, oscar
    from kv4.evaluate.layers import head_dim
    from kv4.evaluate.variant import Variant, by_layers

    if loaded.method == "oscar":
        return [Candidate("OSCAR's recipe", oscar.variant(head_dim(b.model)), loaded)]
    if not loaded.budgets:
        return [Candidate(name, loaded.recipe, loaded)]
    found = []
    refined = f", {loaded.refined} refined" if loaded.refined else ""
    for budget in budgets or loaded.budgets:
        if not simulate:
            loaded.arguments(budget)  # refuses what the packed cache has not
            found.append(Candidate(f"layers {budget:g}{refined}", loaded.packed_recipe, loaded, budget))
            continue
        simulated_only = loaded.why_not_packed(budget) is not None
        base = by_layers() if loaded.refined and simulated_only else Variant()
        variant = base.replace(widths=loaded.widths_of(budget), refined=loaded.refined)
        found.append(Candidate(f"layers {budget:g}{refined}", variant, loaded))
    return found


def _budgeted(budget: float, b: common.Bench, simulate: bool) -> Any:
    """A budget without a calibration. Errors: ValueError for one below what the least widths take."""
    from kv4 import Recipe
    from kv4.evaluate import Candidate

    try:
        used = Recipe(bits=budget)
        variant = _simulated(used, b)
    except ValueError as error:
        raise ValueError(f"--bits: {error}") from None
    return Candidate(f"kv4 {budget:g}", variant if simulate else used)


def _simulated(recipe: Any, b: common.Bench) -> Any:
    from kv4.evaluate.layers import head_dim
    from kv4.evaluate.variant import from_recipe

    return from_recipe(recipe, head_dim(b.model), b.model.config.get_text_config(decoder=True).num_hidden_layers)


def _bits_of(candidate: Any, b: common.Bench) -> float:
    from kv4 import Recipe
    from kv4.evaluate.layers import head_dim

    used = _simulated(candidate.recipe, b) if isinstance(candidate.recipe, Recipe) else candidate.recipe
    if candidate.budget is not None:
        used = used.replace(widths=candidate.calibration.widths_of(candidate.budget))
    d = head_dim(b.model)
    return used.bits_per_value(d, d)


def _show(found: dict[str, Any], title: str) -> None:
    from kv4.evaluate import report

    shown = table(title, *report.HEADER, left=("recipe",))
    for name, q in found.items():
        shown.add_row(*report.quality_cells(name, q))
    shown.caption = f"KL divergence in nats per token, against the exact cache. {_errors_over(found)}"
    shown.caption_justify = "left"
    out.print(shown)
    for name, q in found.items():
        out.print(f"{name}: perplexity {q.ppl:,.3f}, own cache {q.ppl_exact:,.3f}", soft_wrap=True)


def _errors_over(found: dict[str, Any]) -> str:
    over = {q.se_over for q in found.values()}
    return f"Standard errors over {' and '.join(sorted(over))} in brackets." if over else ""


def _peer(name: str, model: str, b: common.Bench, parts: list[Any], threads: int | None) -> dict[str, Any]:
    import torch

    from kv4.evaluate import peers
    from kv4.evaluate.quality import exact_outputs, quality_of

    length = parts[0].shape[1]
    if name == "llama":
        gguf = options.gguf_file(model)
        total = len(parts) * length * (1 + len(peers.LLAMA_TYPES))
        with progress("llama.cpp", total) as advance:
            scores = peers.measure_llama(
                gguf, parts, b.state, threads=threads or torch.get_num_threads(), progress=advance
            )
        return {f"llama.cpp {kind}": quality_of(found, b.model.config, length) for kind, found in scores.items()}
    with progress(f"QuantizedCache {name}", len(parts) * length) as advance:
        hf = peers.measure_hf(
            b.model, parts, lambda ids: exact_outputs(b.model, ids, b.scratch, b.identity), b.state,
            backend=name, identity=b.identity, progress=advance,
        )  # fmt: skip
    return {f"QuantizedCache {name}, 4 bit": quality_of(hf, b.model.config, length)}


@app.command("needle")
@plain_errors
def needle(
    model: common.Model,
    text: common.Text = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated prompt lengths in tokens.")] = "512,1k,2k,4k",
    depths: Annotated[int, typer.Option(min=2, help="Number of passkey positions, from start to end.")] = 5,
    recipe: Annotated[list[str] | None, typer.Option(help="As for kv4 eval; kv4 and paper if not given.")] = None,
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
    state: common.StateFile = None,
    fresh: common.Fresh = False,
    json_: options.JsonFile = None,
    markdown: common.Markdown = None,
    plot: common.Plot = None,
) -> None:
    """Passkey retrieval over depth and length, the model's own cache beside others."""
    sizes = options.numbers(lengths, "--lengths")
    named = {name: common.recipe(name) for name in recipe or ["kv4", "paper"]}
    content, source = common.read_text(text)
    b = common.bench(model, dtype, threads, state, fresh)

    from kv4.evaluate import Candidate, passkey, report

    candidates = [None, *(Candidate(name, used) for name, used in named.items())]
    with progress("passkeys", sum(sizes) * depths * len(candidates)) as advance:
        cells = passkey.needle(
            b.model, b.tokenizer, content, candidates, lengths=sizes,
            depths=[i / (depths - 1) for i in range(depths)], state=b.state, identity=b.identity, progress=advance,
        )  # fmt: skip
    title = f"{model}: passkey in {source}, {depths} depths"
    shown = table(title, "cache", *(f"{n:,} tokens" for n in sizes), left=("cache",))
    for name in dict.fromkeys(cell.cache for cell in cells):
        here = [[c for c in cells if (c.cache, c.length) == (name, n)] for n in sizes]
        shown.add_row(name, *(f"{sum(c.found for c in cs)} of {len(cs)}" for cs in here))
    out.print(shown)
    if json_:
        write_json({"model": b.identity, "text": source, "cells": [cell.to_dict() for cell in cells]}, json_)
    if markdown:
        common.write_markdown([title, "", *report.heat_table(cells)], markdown)
    if plot:
        from kv4.evaluate import plots

        plots.heat_map(cells, plot, title)
        common.say_plot(plot)


@app.command("greedy")
@plain_errors
def greedy(
    model: common.Model,
    text: common.Text = None,
    context: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "1k",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 256,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, from places spread over the text.")] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help="As for kv4 eval; default kv4 and paper.")] = None,
    calibration: Calibrations = None,
    bits: Budgets = None,
    refined: Refined = None,
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """A long greedy generation with the model's own cache, and what each cache would have written along it: the first
    token that differs, and the share that agrees."""
    length = common.whole(context, "--context", 4)
    budgets = common.budgets(bits) if bits is not None else None
    named = {name: common.recipe(name) for name in recipe or ["kv4", "paper"]}
    content, source = common.read_text(text)
    calibrations = _loaded(calibration)
    b = common.bench(model, dtype, threads, None, True)

    from kv4.evaluate import passkey
    from kv4.evaluate.windows import spread

    parts = spread(b.tokenizer, content, prompts, length)
    candidates = _candidates(named, refined, calibrations, budgets, b, False)
    with progress("generating", prompts * tokens * (2 + len(candidates))) as advance:
        found = passkey.greedy(b.model, b.tokenizer, parts, candidates, tokens=tokens, progress=advance)
    title = f"{model}: {tokens} greedy tokens after {length:,} of {source}"
    shown = table(title, "cache", "first difference", "agrees", left=("cache",))
    for name in dict.fromkeys(g.cache for g in found):
        here = [g for g in found if g.cache == name]
        first = ", ".join("none" if g.first_difference == tokens else f"{g.first_difference:,}" for g in here)
        shown.add_row(name, first, f"{100 * sum(g.forced for g in here) / len(here):.1f} %")
    shown.caption = f"{passkey.EXACT}: the own cache again, in one call: where that differs, rounding decides."
    shown.caption_justify = "left"
    out.print(shown)
    if json_:
        caches = [g.to_dict() for g in found]
        write_json({"model": b.identity, "text": source, "context": length, "caches": caches}, json_)


@app.command("energy")
@plain_errors
def energy(
    models: Annotated[list[str], typer.Argument(help="Names of `kv4 models`, HuggingFace folders or GGUF files.")],
    text: common.Text = None,
    length: Annotated[str, typer.Option(help="Tokens of the one window.")] = "1k",
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
    plot: common.Plot = None,
) -> None:
    """Per layer: the share of key energy in the mean, and what quantising does to scores."""
    tokens = common.whole(length, "--length", 128)
    content, source = common.read_text(text)
    found: dict[str, list[Any]] = {}
    for model in models:
        b = common.bench(model, dtype, threads, None, True)

        from kv4.evaluate.calibrate import capture
        from kv4.evaluate.energy import key_energy
        from kv4.evaluate.windows import cut

        layers = capture(b.model, cut(b.tokenizer, content, 1, tokens)[0])
        config = b.model.config.get_text_config(decoder=True)
        scale = (getattr(config, "query_pre_attn_scalar", None) or layers[0].key.shape[-1]) ** -0.5
        found[model] = key_energy(layers, scale)
        shown = table(
            f"{model}: keys of {tokens:,} tokens of {source}", "layer", "energy in the mean", "in page means",
            "largest mean", "score error, paper", "kv4",
        )  # fmt: skip
        for row in found[model]:
            shown.add_row(
                str(row.layer), f"{100 * row.mean:.1f} %", f"{100 * row.page_mean:.1f} %", f"{row.largest:.1f}",
                f"{row.paper:.3f}", f"{row.kv4:.3f}",
            )  # fmt: skip
        out.print(shown)
    if json_:
        rows = {name: [row.to_dict() for row in rows] for name, rows in found.items()}
        write_json({"text": source, "models": rows}, json_)
    if plot:
        from kv4.evaluate import plots

        plots.energy(found, plot, f"Keys of {tokens:,} tokens of {source}")
        common.say_plot(plot)
