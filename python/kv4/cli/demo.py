"""`kv4 demo`: generation from real text, side by side with the model's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from kv4.cli import options
from kv4.cli.bench import show_generate
from kv4.cli.output import mebibytes, out, plain_errors, progress, table, write_json
from kv4.cli.usage import new_folder

PROMPT_TOKENS = 1024


@plain_errors
def demo(
    model: Annotated[str, typer.Option(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")] = (
        options.DEFAULT_MODEL
    ),
    tokens: Annotated[int, typer.Option(min=8, help="Tokens to generate.")] = 64,
    contexts: Annotated[str, typer.Option(help="Other context lengths of the plot.")] = "256,4096",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of every measurement.")] = 2,
    dtype: Annotated[options.DType, typer.Option(help="auto: the CPU's fastest dtype.")] = options.DType.auto,
    folder: Annotated[
        Path, typer.Option("--out", callback=new_folder, help="Folder for the plot and the data.")
    ] = Path("out"),
    threads: options.Threads = None,
) -> None:
    """Text after a prompt of over 1,000 tokens, from the model's own cache and from kv4."""
    others = options.numbers(contexts, "--contexts")
    options.set_threads(threads)
    loaded, tokenizer = options.load(model, options.torch_dtype(dtype))

    import torch

    from kv4.bench import generate as measurement
    from kv4.bench.text import prompt_ids

    name = str(loaded.dtype).removeprefix("torch.")
    ids = prompt_ids(tokenizer, max(*others, 2 * PROMPT_TOKENS))
    prompt = _paragraph_end(tokenizer, ids[0].tolist())
    lengths = sorted({prompt, *others})
    out.print(
        f"[bold]{escape(model)}[/], {name}, {torch.get_num_threads()} threads. Prompt: {prompt:,} tokens of "
        f"Python's language reference, then {tokens} tokens greedily; medians of {repeats} repeats, taking turns."
    )
    out.print(Text("... " + _tail(tokenizer.decode(ids[0, :prompt])), style="dim italic"))

    total = 2 * (lengths[-1] + len(lengths) * repeats * tokens)
    with progress("", total) as advance:
        rows = measurement.run(
            {name: loaded},
            ids,
            lengths,
            tokens=tokens - 1 - measurement.WARM_UP,
            repeats=repeats,
            progress=lambda what, n: advance(n, what),
        )
    own, kv4 = next(pair for pair in measurement.best_rows(rows) if pair[0].context == prompt)
    out.print(
        side_by_side([[_shown(tokenizer, t) for t in made] for made in (own.generated, kv4.generated)], out.width)
    )
    out.print(_figures(own, kv4))
    show_generate(model, rows)
    picture = folder / "demo.png"
    plot(rows, model, picture)
    write_json({"model": model, "rows": [row.to_dict() for row in rows]}, folder / "demo.json")
    out.print(f"plot: {escape(str(picture))}", soft_wrap=True)


def _paragraph_end(tokenizer: Any, ids: Sequence[int]) -> int:
    """The first paragraph's end from PROMPT_TOKENS on, so that the model starts a fresh sentence."""
    for count in range(PROMPT_TOKENS, 2 * PROMPT_TOKENS):
        if tokenizer.decode(ids[count - 2 : count]).endswith("\n\n"):
            return count
    return PROMPT_TOKENS


def _tail(text: str, characters: int = 240) -> str:
    return text.rstrip()[-characters:].split(" ", 1)[-1]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def _shown(tokenizer: Any, token: int) -> str:
    return tokenizer.decode(token).replace("\n", "\u23ce").replace("\t", "\u21e5")


def side_by_side(words: Sequence[Sequence[str]], width: int) -> Any:
    """A table of two texts, [own, kv4] by tokens, with as many per row as fit the terminal's width without wrapping."""
    shown = table("tokens side by side", "#", "own cache", "kv4", left=("own cache", "kv4"))
    count = len(words[0])
    # Beside the cells: edges, and a place to the right of each column, and between them.
    room = (width - len(str(count)) - 7) // 2
    for column in shown.columns[1:]:
        column.no_wrap, column.max_width = True, room
    begin = 0
    while begin < count:
        end = begin + 1
        while end < count and all(cell_len("|".join(text[begin : end + 1])) < room for text in words):
            end += 1
        cells = []
        for mine, other in (words, words[::-1]):
            cell = Text(overflow="ellipsis")
            for at in range(begin, min(end, len(mine))):
                cell.append(mine[at], style="green" if mine[at] == other[at] else "bold red")
                cell.append("\u2502", style="dim")
            cells.append(cell)
        shown.add_row(str(begin + 1), *cells)
        begin = end
    return shown


def _figures(own: Any, kv4: Any) -> Any:
    differs = first_difference(own.generated, kv4.generated)
    count = len(own.generated)
    same = sum(a == b for a, b in zip(own.generated, kv4.generated, strict=True))
    shown = table(f"after a prompt of {own.context:,} tokens", "", "own cache", "kv4", "own / kv4", left=("",))
    shown.add_row(
        "decode, ms/token (median)",
        f"{own.ms_per_token:.2f}",
        f"{kv4.ms_per_token:.2f}",
        f"{own.ms_per_token / kv4.ms_per_token:.2f}x",
    )
    shown.add_row("prefill, s", f"{own.prefill_seconds:.2f}", f"{kv4.prefill_seconds:.2f}", "")
    shown.add_row(
        "cache held",
        mebibytes(own.cache_bytes),
        mebibytes(kv4.cache_bytes),
        f"{own.cache_bytes / kv4.cache_bytes:.2f}x",
    )
    shown.add_row("the same in fp16", mebibytes(own.fp16_bytes), "", f"{kv4.ratio:.2f}x")
    shown.add_row("tokens that agree", "", f"{same} of {count}", "")
    shown.add_row("first divergence", "", "none" if differs is None else f"token {differs + 1}", "")
    return shown


def plot(rows: Sequence[Any], model: str, path: Path) -> None:
    """Cache bytes and ms/token against context, own cache and kv4, as a PNG."""
    from matplotlib.figure import Figure

    from kv4.bench.generate import best_rows

    pairs = best_rows(rows)
    contexts = [own.context for own, _ in pairs]
    colours = {"own": "#8a8f98", "fp16": "#d98c2b", "kv4": "#1f77b4"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    dtype = pairs[0][0].dtype
    lines = [(f"own cache ({dtype})", "own", [own.cache_bytes for own, _ in pairs])]
    if dtype == "float32":
        lines.append(("own cache in fp16", "fp16", [own.fp16_bytes for own, _ in pairs]))
    lines.append(("kv4", "kv4", [kv4.cache_bytes for _, kv4 in pairs]))
    for label, colour, values in lines:
        memory.plot(contexts, [v / (1 << 20) for v in values], "o-", color=colours[colour], label=label)
    speed.plot(contexts, [own.ms_per_token for own, _ in pairs], "o-", color=colours["own"], label=lines[0][0])
    speed.plot(contexts, [kv4.ms_per_token for _, kv4 in pairs], "o-", color=colours["kv4"], label="kv4")
    for axes, title in ((memory, "cache, MiB"), (speed, "decode, ms per token")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("tokens in the cache")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.suptitle(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
