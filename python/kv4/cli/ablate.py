"""`kv4 ablate` and `kv4 calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kv4.cli import common, options
from kv4.cli.output import err, out, plain_errors, progress, table, write_json
from kv4.cli.usage import new_file

CALIBRATION_WINDOWS = 2


@plain_errors
def ablate(
    model: common.Model,
    text: common.Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows from the start of the text.")] = 2,
    length: common.Length = "2048",
    rows: Annotated[
        str,
        typer.Option(help="all, or comma-separated names of groups and rows; --list prints them."),
    ] = "all",
    calibration_text: Annotated[
        Path | None,
        typer.Option(
            help="The text on which lambda and matrices are measured or trained; the end of --text if not given."
        ),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="KL to second order, from gradients: one pass a window for all rows."),
    ] = False,
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
    state: common.StateFile = None,
    fresh: common.Fresh = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the rows and stop.")] = False,
    json_: options.JsonFile = None,
    markdown: common.Markdown = None,
    plot: common.Plot = None,
) -> None:
    """The contribution of each step of the recipe, by fake quantisation inside attention."""
    from kv4.evaluate.rows import select

    if list_:
        for row in select(rows, 128):
            out.print(f"{row.group:<9} {row.name:<20} {row.label}", soft_wrap=True)
        return
    if "rot-h" not in rows:  # numbers of reflectors depend on the head dim
        select(rows, 128)  # an unknown name is reported before anything is loaded
    tokens = common.whole(length, "--length", 256)
    content, source = common.read_text(text)
    b = common.bench(model, dtype, threads, state, fresh)

    import tempfile

    from kv4.evaluate import report
    from kv4.evaluate.ablate import Calibrations
    from kv4.evaluate.ablate import ablate as run
    from kv4.evaluate.ablate import predict as run_prediction
    from kv4.evaluate.layers import head_dim
    from kv4.evaluate.windows import cut

    chosen = select(rows, head_dim(b.model))
    parts = cut(b.tokenizer, content, windows, tokens)
    calibration, calibration_source = _calibration_windows(b, content, source, calibration_text, parts, tokens)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = b.scratch or Path(temporary)
        needed = Calibrations(b.model, calibration, b.identity, scratch, calibration_source)
        with progress(f"{len(chosen)} rows", windows * tokens * len(chosen)) as advance:
            if predict:
                found = run_prediction(b.model, parts, chosen, needed, progress=advance)
                _show_predictions(found, f"{model}: {windows} windows of {tokens:,} tokens of {source}; calibration on "
                                  f"{calibration_source}", json_, markdown)  # fmt: skip
                return
            results = run(
                b.model, parts, chosen, needed, state=b.state, identity=b.identity, scratch=b.scratch, progress=advance
            )
    title = f"{model}: {windows} windows of {tokens:,} tokens of {source}, second halves scored"
    shown = table(title, *report.ABLATION, left=("row",))
    group = ""
    for result in results:
        if result.row.group != group:
            shown.add_section()
            group = result.row.group
        shown.add_row(*report.ablation_cells(result))
    shown.caption = f"MSE: relative, on {calibration_source}; q.k by the second moments of queries."
    shown.caption_justify = "left"
    out.print(shown)
    if json_:
        data = {"model": b.identity, "text": source, "length": tokens, "windows": windows}
        write_json({**data, "calibration": calibration_source, "rows": [r.to_dict() for r in results]}, json_)
    if markdown:
        lines = report.markdown(report.ABLATION, [report.ablation_cells(r) for r in results])
        common.write_markdown([f"{title}. MSE on {calibration_source}.", "", *lines], markdown)
    if plot:
        from kv4.evaluate import plots

        bars = [(r.row.group, r.row.label, r.quality.kl, r.quality.kl_se) for r in results]
        plots.table(bars, plot, title)
        common.say_plot(plot)


def _show_predictions(found: list[Any], title: str, json_: Path | None, markdown: Path | None) -> None:
    from kv4.evaluate import report

    shown = table(title, *report.PREDICTION, left=("row",))
    for prediction in found:
        shown.add_row(*report.prediction_cells(prediction))
    shown.caption = "Nats per token, to second order in the errors."
    shown.caption_justify = "left"
    out.print(shown)
    if json_:
        write_json({"title": title, "predictions": [p.to_dict() for p in found]}, json_)
    if markdown:
        lines = report.markdown(report.PREDICTION, [report.prediction_cells(p) for p in found])
        common.write_markdown([f"{title}.", "", *lines], markdown)


def _calibration_windows(
    b: common.Bench, content: str, source: str, given: Path | None, scored: list[Any], tokens: int
) -> tuple[list[Any], str]:
    """Windows for calibration, disjoint from the scored ones."""
    import torch

    from kv4.bench.text import encode
    from kv4.evaluate.windows import cut

    size = min(tokens, 2048)
    if given is not None:
        text, name = options.read_utf8("--calibration-text", given), given.name
        return cut(b.tokenizer, text, CALIBRATION_WINDOWS, size), name
    ids = encode(b.tokenizer, content)[0]
    prefix = encode(b.tokenizer, "")[0]
    fresh = size - len(prefix)
    used = len(scored) * tokens
    if len(ids) < used + CALIBRATION_WINDOWS * fresh:
        raise ValueError(
            f"--calibration-text: expected one where {source} has no {CALIBRATION_WINDOWS * fresh} tokens beyond the "
            f"windows that are scored; got none"
        )
    tail = ids[len(ids) - CALIBRATION_WINDOWS * fresh :]
    return [torch.cat([prefix.to(ids.dtype), part])[None] for part in tail.split(fresh)], f"the end of {source}"


@plain_errors
def calibrate(
    model: common.Model,
    output: Annotated[Path, typer.Argument(callback=new_file, help="The safetensors file to write.")],
    text: common.Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows from the start of the text.")] = 4,
    length: Annotated[str, typer.Option(help="Tokens in a window.")] = "2048",
    first: Annotated[int, typer.Option(min=0, help="Windows of the text to skip.")] = 0,
    method: Annotated[
        str,
        typer.Option(
            help="lambda: a weight per channel. transform: the full matrix of least error of q.k. layers: bit widths "
            "of the keys and values of each layer. oscar: that method's rotations."
        ),
    ] = "lambda",
    bits: Annotated[
        str | None,
        typer.Option(help="layers: budgets in bits per value, scales and means included; 2.5,3.25,4.25 if not given."),
    ] = None,
    refined: Annotated[
        int | None, typer.Option(min=0, max=2, help="layers: keys of a page that are refined beside the widths; 0.")
    ] = None,
    most_bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="layers: the largest width; 8. CUDA devices read up to 4.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="kv4, trellis, paper or a recipe file: the rest of the recipe.")] = "kv4",
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
) -> None:
    """Measure lambda, a full matrix for keys or widths of layers on a text; `kv4 eval` and `kv4 generate --calibration`
    and kv4.hf.attach take it."""
    tokens = common.whole(length, "--length", 256)
    used = common.recipe(recipe, known=("kv4", "trellis", "paper"))

    from kv4.evaluate import layers, oscar
    from kv4.evaluate.calibrate import METHODS
    from kv4.evaluate.calibrate import calibrate as run
    from kv4.evaluate.windows import cut

    known = (*METHODS, "layers", "oscar")
    if method not in known:
        raise ValueError(f"--method: expected one of {', '.join(known)}; got {method!r}")
    allowed = {"layers": ("kv4", "trellis"), "oscar": ("kv4",)}.get(method)
    if allowed and recipe not in allowed:
        raise ValueError(f"--recipe: expected {' or '.join(allowed)} with --method {method}; got {recipe}")
    if bits is not None and method != "layers":
        raise ValueError(f"--bits: expected with --method layers only; got --method {method}")
    if refined is not None and method != "layers":
        raise ValueError(f"--refined: expected with --method layers only; got --method {method}")
    if most_bits is not None and method != "layers":
        raise ValueError(f"--most-bits: expected with --method layers only; got --method {method}")
    budgets = common.budgets(bits) if bits is not None else layers.BUDGETS
    content, source = common.read_text(text)
    b = common.bench(model, dtype, threads, None, True)

    parts = cut(b.tokenizer, content, windows, tokens, first)
    with progress(f"{windows} windows of {tokens:,} tokens", windows * tokens) as advance:
        about = {"identity": b.identity, "text": source, "progress": advance}
        if method == "layers":
            made = layers.calibrate(
                b.model, parts, bits=budgets, recipe=used, refined=refined or 0, most=most_bits or 8, **about
            )
        elif method == "oscar":
            made = oscar.calibrate(b.model, parts, **about)
        else:
            made = run(b.model, parts, method=method, recipe=used, **about)
    made.save(output)
    err.print(f"calibration: {escape(str(output))}", soft_wrap=True)
