"""`kv4 eval`: quality of a recipe against the exact cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from kv4.cli import options
from kv4.cli.output import mebibytes, out, plain_errors, progress, table, write_json


@plain_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text; Python's language reference if not given.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows from the start of the text.")] = 10,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window; its second half is scored.")] = 2048,
    recipe: Annotated[str, typer.Option(help="kv4, paper, exact, or a recipe file.")] = "kv4",
    dtype: Annotated[options.DType, typer.Option(help="The model's dtype.")] = options.DType.float32,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """KL divergence, top-1 agreement and perplexity against the model's own cache."""
    from kv4.bench.text import python_reference

    named = recipe in ("kv4", "paper", "exact")
    used = options.load_recipe(recipe if named else "kv4", None if named else Path(recipe))
    if text is not None and not text.is_file():
        raise FileNotFoundError(f"--text: expected a file; got {text}")
    content = python_reference() if text is None else text.read_text(encoding="utf-8")
    options.set_threads(threads)
    loaded, tokenizer = options.load(model, options.torch_dtype(dtype))

    from kv4.evaluate import measure

    with progress(f"{windows} windows of {length:,} tokens", 2 * windows * length) as advance:
        found = measure(loaded, tokenizer, content, used, windows=windows, length=length, progress=advance)
    source = "Python's language reference" if text is None else text.name
    shown = table(
        f"{model}, recipe {recipe}: {windows} windows of {length:,} tokens of {source}, second halves scored",
        "what", "mean", "standard error", left=("what",),
    )  # fmt: skip

    def error(value: float, digits: int) -> str:
        return "one window" if math.isnan(value) else f"{value:.{digits}f}"

    shown.add_row("KL divergence, nats per token", f"{found.kl:.5f}", error(found.kl_se, 5))
    shown.add_row("top-1 agreement", f"{found.top1:.4f}", error(found.top1_se, 4))
    shown.add_row("perplexity, own cache", f"{found.ppl_exact:.3f}", "")
    shown.add_row("perplexity, this recipe", f"{found.ppl:.3f}", "")
    shown.add_row("change of perplexity, %", f"{100 * found.dppl:+.3f}", error(100 * found.dppl_se, 3))
    shown.add_row("cache at the end of a window", mebibytes(found.cache_bytes), "")
    shown.add_row("times smaller than fp16", f"{found.fp16_bytes / found.cache_bytes:.2f}", "")
    out.print(shown)
    if json_:
        data = {"model": model, "text": source, "recipe": used.to_dict(), "quality": found.to_dict()}
        write_json(data, json_)
