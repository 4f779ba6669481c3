"""`kv4 bench`: attention, sealing, and whole-model generation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kv4.cli import bench_cuda, bench_vllm, options
from kv4.cli.openmp import VARIABLES
from kv4.cli.output import err, out, plain_errors, progress, table, write_json
from kv4.cli.usage import new_file

_DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}

app = typer.Typer(help="Measurements, with the candidates interleaved in one process.", no_args_is_help=True)


@app.command("generate")
@plain_errors
def generate(
    model: Annotated[str, typer.Option(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")] = (
        options.DEFAULT_MODEL
    ),
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of a model: random weights of the shape of llama-3-8b, qwen2.5-1.5b or a tiny one."),
    ] = None,
    device: options.Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the batch, all of one prompt.")] = 1,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache before decoding.")] = "256,1024,4096",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a repeat.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Each cache is shown in the fastest of these; float32,bfloat16 on the CPU, bfloat16 on CUDA.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file; kv4's default if not given.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random keys and values instead of a prefill: long contexts in seconds.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Also kv4's attention on a cache of exact rows.")] = False,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Busy processes beside which everything is measured again: a loaded machine.")
    ] = 0,
    pin: Annotated[bool, typer.Option(help="Pin neighbours to CPUs, round robin.")] = True,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """Milliseconds per generated token: kv4 against the model's own cache."""
    import torch

    from kv4.bench import generate as measurement
    from kv4.bench import shapes
    from kv4.bench.text import prompt_ids

    lengths = options.numbers(contexts, "--contexts")
    where = options.torch_device(device)
    kinds = options.names(dtypes or _DTYPES[where.type], "--dtypes", ["float32", "bfloat16", "float16"])
    used = options.load_recipe("kv4", recipe)
    options.set_threads(threads)
    loaded = {}
    for kind in kinds:
        if shape is None:
            loaded[kind], tokenizer = options.load(model, getattr(torch, kind), where)
        else:
            loaded[kind] = shapes.random_model(shape, getattr(torch, kind), where)
    if shape is None:
        ids = prompt_ids(tokenizer, lengths[-1]).to(where)
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(loaded[kinds[0]].config.vocab_size, (1, lengths[-1]), generator=generator).to(where)
    ids = ids.expand(batch, -1)
    # An upper bound: a slow dtype is dropped, and its share of the bar with it.
    turns = len(lengths) * repeats * (2 if neighbours else 1)
    total = (2 + exact + (where.type == "cuda")) * len(kinds) * (lengths[-1] + turns * tokens)
    with progress("", total) as advance:
        rows = measurement.run(
            loaded,
            ids,
            lengths,
            tokens=tokens,
            repeats=repeats,
            recipe=used,
            exact=exact,
            random_fill=random,
            neighbours=neighbours,
            pin=pin,
            progress=lambda what, done: advance(done, what),
        )
    name = model if shape is None else f"{shape} (random weights)"
    at = "" if where.type == "cpu" and batch == 1 else f", {options.device_title(where)}, batch {batch}"
    show_generate(name + at, rows)
    if neighbours:
        show_loaded(neighbours, rows)
    if json_:
        data = {
            "model": name,
            "device": options.device_title(where),
            "batch": batch,
            "threads": torch.get_num_threads(),
            "tokens": tokens,
            "random_fill": random,
            "neighbours": neighbours,
            "pinned": pin and neighbours > 0,
            "openmp": {name: os.environ.get(name) for name in VARIABLES},
            "recipe": used.to_dict(),
            "rows": [row.to_dict() for row in rows],
        }
        write_json(data, json_)


def show_generate(model: str, rows: list) -> None:
    from kv4.bench.generate import EXACT, GRAPH, best_of, best_rows

    shown = table(
        f"decode of {model}; ms per token, each cache in its best dtype",
        "context", "own", "kv4", "kv4/own", "own MiB", "fp16 MiB", "kv4 MiB", "fp16/kv4",
    )  # fmt: skip
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    pairs = best_rows(rows)
    for own, kv4 in pairs:
        quotient = kv4.ms_per_token / own.ms_per_token
        shown.add_row(
            f"{own.context:,}",
            *(f"{x.ms_per_token:.2f} {short[x.dtype]}" if x.repeats_ms else "no memory" for x in (own, kv4)),
            f"[{'green' if quotient <= 1 else 'red'}]{quotient:.3f}[/]" if quotient == quotient else "-",
            *(f"{count / (1 << 20):.2f}" for count in (own.cache_bytes, kv4.fp16_bytes, kv4.cache_bytes)),
            f"{kv4.ratio:.2f}x",
        )
    out.print(shown)
    if graph := best_of(rows, GRAPH):
        replayed = table(
            "the same with kv4's steps replayed as a CUDA graph", "context", "own", "kv4 graph", "graph/own"
        )
        for own, _ in pairs:
            if (row := graph.get(own.context)) is None:
                continue
            own_ms = f"{own.ms_per_token:.2f}" if own.repeats_ms else "no memory"
            quotient = f"{row.ms_per_token / own.ms_per_token:.3f}" if own.repeats_ms else "-"
            replayed.add_row(f"{own.context:,}", own_ms, f"{row.ms_per_token:.2f}", quotient)
        out.print(replayed)
    if not (exact := best_of(rows, EXACT)):
        return
    beside = table("the same against exact rows under kv4's attention", "context", "kv4 exact", "kv4", "kv4/exact")
    for own, kv4 in pairs:
        if (other := exact.get(own.context)) is None:
            continue
        beside.add_row(
            f"{own.context:,}",
            f"{other.ms_per_token:.2f} {short[other.dtype]}",
            f"{kv4.ms_per_token:.2f} {short[kv4.dtype]}",
            f"{kv4.ms_per_token / other.ms_per_token:.3f}",
        )
    out.print(beside)


def show_loaded(neighbours: int, rows: list) -> None:
    from kv4.bench.generate import best_rows

    shown = table(
        f"the same beside {neighbours} busy {'process' if neighbours == 1 else 'processes'}; ms per token",
        "context", "own, idle", "own, loaded", "loaded / idle",
        "kv4, idle", "kv4, loaded", "loaded / idle", "kv4/own, loaded",
    )  # fmt: skip
    for own, kv4 in best_rows(rows):
        figures = (own.ms_per_token, own.loaded_ms_per_token, own.slowdown)
        figures += (kv4.ms_per_token, kv4.loaded_ms_per_token, kv4.slowdown)
        quotient = kv4.loaded_ms_per_token / own.loaded_ms_per_token
        shown.add_row(f"{own.context:,}", *(f"{x:.2f}" if x == x else "-" for x in (*figures, quotient)))
    out.print(shown)


@app.command("attention")
@plain_errors
def attention(
    geometries: Annotated[
        str | None,
        typer.Option(help="Comma-separated names of models, or all; three of them if not given.", show_default=False),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens in the cache; 1k means 1024. 4k,32k if not given.", show_default=False),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Every geometry at 1k,4k,16k,32k, each timed longer: minutes.")
    ] = False,
    device: options.Device = "cpu",
    cases: Annotated[str, typer.Option(help="On CUDA, instead of --tokens: batch x tokens.")] = (
        "16x32k,64x8k,1x128k,1x4k"
    ),
    repeats: Annotated[
        int | None, typer.Option(min=1, help="3; on CUDA and with --all 7, if not given.", show_default=False)
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Time of one candidate in one repeat; .05, with --all .2, if not given.", show_default=False
        ),
    ] = None,
    llama: Annotated[
        str | None, typer.Option(help="Also llama.cpp on this model: a name of `kv4 models` or a GGUF file.")
    ] = None,
    llama_contexts: Annotated[str, typer.Option(help="Contexts of llama.cpp's slope.")] = "512,2k,4k",
    plot: Annotated[
        Path | None, typer.Option(callback=new_file, help="Time against context with the roofline, as a PNG.")
    ] = None,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """Decode attention alone: int4 pages, exact rows with the same kernels, torch's SDPA, llama.cpp."""
    if (where := options.torch_device(device)).type == "cuda":
        if llama or plot:
            raise ValueError("--llama, --plot: expected with --device cpu only; got --device cuda")
        bench_cuda.attention(geometries or "all", cases, where, repeats or 7, json_)
        return
    from kv4 import _core
    from kv4.bench import attention as measurement
    from kv4.bench import llama as llama_cpp

    known = list(measurement.GEOMETRIES)
    chosen = list(measurement.QUICK_GEOMETRIES)
    if geometries is not None:
        chosen = known if geometries == "all" else options.names(geometries, "--geometries", known)
    elif all_:
        chosen = known
    lengths = list(measurement.ALL_TOKENS if all_ else measurement.QUICK_TOKENS)
    if tokens is not None:
        lengths = options.numbers(tokens, "--tokens")
    each, times = seconds or (0.2 if all_ else 0.05), repeats or (7 if all_ else 3)
    depths = options.numbers(llama_contexts, "--llama-contexts")
    file = None
    if llama:  # a missing dependency is reported before anything is measured
        llama_cpp.require()
        llama_cpp.check_contexts(depths)
        file = options.gguf_file(llama)
    options.set_threads(threads)
    rows = []
    with progress("", len(chosen) * len(lengths)) as advance:
        for geometry in chosen:
            for length in lengths:
                advance(0, f"{geometry}, {length:,} tokens")
                found = measurement.measure(geometry, length, seconds=each, repeats=times)
                rows += found
                advance(1)
                err.print(measurement.summary(found), soft_wrap=True)
    others = []
    if file:
        with progress("", None) as advance:
            others = llama_cpp.measure(file, depths, threads=_core.num_threads(), report=lambda text: advance(0, text))
    where = f"{_core.isa()}, {_core.num_threads()} threads"
    out.print(f"decode attention, {where}; medians per token and KV head")
    for geometry in chosen:
        show_attention(geometry, [row for row in rows if row.geometry == geometry], others)
    if others:
        show_llama(others)
    if busy := measurement.disturbed(rows):
        out.print(
            f"The machine was not idle: {_core.num_threads()} threads took hardly less time than one at "
            f"{'; '.join(busy)}. These figures are not to be compared."
        )
    if plot:
        from kv4.bench.plot import attention as draw

        draw(rows, plot, f"decode attention, {where}")
        out.print(f"plot: {escape(str(plot))}", soft_wrap=True)
    if json_:
        data = {"isa": _core.isa(), "threads": _core.num_threads(), "rows": [row.to_dict() for row in rows]}
        write_json({**data, "llama": [row.to_dict() for row in others]}, json_)


def show_attention(geometry: str, rows: list, others: list) -> None:
    candidates = list(dict.fromkeys(row.candidate for row in rows))
    first = rows[0]
    shown = table(
        f"{geometry}: {first.q_heads} query heads, {first.kv_heads} KV heads, d = {first.head_dim}",
        "tokens", "candidate", "ns", "bytes", "GB/s", "of roofline", "time / int4", left=("candidate",),
    )  # fmt: skip
    shape = (first.q_heads, first.kv_heads, first.head_dim)
    same = [other for other in others if (other.q_heads, other.kv_heads, other.head_dim) == shape]
    for length in sorted({row.tokens for row in rows}):
        here = {row.candidate: row for row in rows if row.tokens == length}
        int4 = here["kv4 int4"].ns_per_token_head
        for name in candidates:
            row = here[name]
            shown.add_row(
                f"{length:,}" if name == candidates[0] else "",
                name,
                f"{row.ns_per_token_head:.2f}",
                f"{row.bytes_per_token_head:.0f}",
                f"{row.gb_per_s:.1f}",
                # The roofline is that of all threads.
                "" if name.endswith("1 thread") else f"{row.roofline:.0%}",
                f"{row.ns_per_token_head / int4:.2f}x",
            )
        for other in same:
            slope = other.ns_per_token_head
            shown.add_row("", f"llama.cpp {other.cache_type}", f"{slope:.1f}", "", "", "", f"{slope / int4:.1f}x")
        read = here["kv4 int4"].read_bandwidth
        shown.add_row("", "reading memory", "", "", f"{1e-9 * read:.1f}", "", "", end_section=True)
    out.print(shown)


def show_llama(rows: list) -> None:
    shown = table(
        f"llama.cpp, {rows[0].model}: ms per token, and its slope per token, KV head and layer",
        "cache", *(f"{depth:,}" for depth in rows[0].contexts), "ns", left=("cache",),
    )  # fmt: skip
    for row in rows:
        shown.add_row(row.cache_type, *(f"{ms:.1f}" for ms in row.ms_per_token), f"{row.ns_per_token_head:.1f}")
    out.print(shown)


@app.command("seal")
@plain_errors
def seal(
    dims: Annotated[str, typer.Option(help="Head dims.")] = "64,80,96,128,160,192,256",
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """Fused rotate + lambda + abs-max + pack, beside the paper's 25 ns and 182 GFLOP/s."""
    from kv4 import Recipe, _core
    from kv4.bench import seal as measurement

    chosen = options.numbers(dims, "--dims")
    for dim in chosen:
        try:
            _core.validate(Recipe(), dim, dim)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"--dims: {error}") from None
    options.set_threads(threads)
    rows = []
    with progress("", 3 * len(chosen)) as advance:
        for dim in chosen:
            advance(0, f"d = {dim}")
            rows.append(measurement.kernel(dim, repeats=repeats))
            advance(1)
            for what, recipe in (
                ("cache, paper's recipe", Recipe.paper()),
                ("cache, kv4's recipe", Recipe()),
            ):
                rows.append(measurement.through_cache(what, recipe, dim))
                advance(1)
    shown = table(
        f"sealing, {_core.isa()}, {_core.num_threads()} threads; medians per vector",
        "d", "what", "ns / vector", "GFLOP/s", "GFLOP/s, paper's count",
        left=("what",),
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            str(row.dim) if row.what == "kernel" else "",
            row.what,
            f"{row.ns_per_vector:.1f}",
            f"{row.gflops:.1f}",
            f"{row.paper_gflops:.1f}",
            end_section=row is rows[-1] or row.what.startswith("cache, kv4"),
        )
    paper = (f"{measurement.PAPER_NS:.0f}", "", f"{measurement.PAPER_GFLOPS:.0f}")
    shown.add_row(str(measurement.PAPER_DIM), "paper: kernel, Apple M1 8-core GPU", *paper, style="cyan")
    out.print(shown)
    out.print(f"FLOP per vector: {measurement.FLOP_FORMULA}", soft_wrap=True)
    out.print("paper's count: 5 d log2 d, as its 182 GFLOP/s x 25 ns at d = 128 are within 2 %", soft_wrap=True)
    if json_:
        data = {
            "isa": _core.isa(),
            "threads": _core.num_threads(),
            "flops_per_vector": measurement.FLOP_FORMULA,
            "paper": {
                "dim": measurement.PAPER_DIM,
                "ns_per_vector": measurement.PAPER_NS,
                "gflops": measurement.PAPER_GFLOPS,
            },
            "rows": [row.to_dict() for row in rows],
        }
        write_json(data, json_)


@app.command("mlx")
@plain_errors
def mlx(
    model: Annotated[str, typer.Option(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")] = (
        options.DEFAULT_MODEL
    ),
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of text; the second half is scored.")] = 512,
    generated: Annotated[int, typer.Option(min=1, help="Greedy tokens after the first half.")] = 48,
    dtype: Annotated[options.DType, typer.Option(help="Of the model.")] = options.DType.float32,
    json_: options.JsonFile = None,
) -> None:
    """mlx-lm with kv4's cache beside its own and its 4-bit one: bytes, KL, greedy tokens."""
    if dtype is options.DType.auto:
        dtype = options.DType.float32
    folder = options.model_folder(model)
    try:
        from kv4.bench import mlx as measurement
    except ImportError as error:
        raise ImportError(f"kv4 bench mlx: expected mlx and mlx-lm (pip install 'kv4[mlx]'); got {error}") from None
    loaded, tokenizer = measurement.load(folder, dtype.value)
    with progress("", len(measurement.caches())) as advance:
        rows = measurement.run(
            loaded, tokenizer, tokens=tokens, generated=generated, progress=lambda what: advance(1, what)
        )
    shown = table(
        f"{model} in {dtype.value}, {tokens} tokens in calls of {measurement.CALL}",
        "cache", "bytes, fp16 model", "own / this", "KL, nats", "top-1", f"same of {generated} tokens",
        left=("cache",),
    )  # fmt: skip
    for row in rows:
        if row.refused:
            shown.add_row(row.cache, escape(row.refused))
            continue
        ratio = f"{rows[0].nbytes / row.nbytes:.2f}"
        shown.add_row(row.cache, f"{row.nbytes:,}", ratio, f"{row.kl:.5f}", f"{row.top1:.4f}", str(row.same))
    out.print(shown)
    if json_:
        write_json({"model": model, "tokens": tokens, "rows": [row.to_dict() for row in rows]}, json_)


@app.command("vllm")
@plain_errors
def vllm(
    model: Annotated[Path | None, typer.Option(help="A model's folder.", show_default=False)] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model: random weights of the shape of llama-3-8b or another model.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers of --shape; all if not given.")] = None,
    kinds: Annotated[
        str, typer.Option(help="Caches: some of own, fp8, int4_per_token_head, kv4, kv4-exact.")
    ] = "own,fp8,int4_per_token_head,kv4",
    cases: Annotated[str, typer.Option(help="Sequences x tokens of each.")] = "1x4k,16x4k,16x8k",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, each of one token per sequence.")] = 64,
    batched_tokens: Annotated[
        int | None, typer.Option(min=64, help="Most tokens of a step; vLLM's default if not given.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0.01, max=1.0, help="Fraction of the GPU's memory for vLLM.")] = 0.9,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor parallelism: the number of GPUs.")] = 1,
    dtype: Annotated[options.DType, typer.Option(help="Of the model.")] = options.DType.auto,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile and CUDA graphs.")] = False,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Instead of steps: a server under this many chats, with vLLM's `bench serve`."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="With --requests: chats per second; all at once if not given.")
    ] = None,
    longest: Annotated[int, typer.Option(min=10, help="With --requests: most words of a prompt.")] = 8192,
    json_: options.JsonFile = None,
) -> None:
    """Milliseconds per step of vLLM, or a server's latencies under many chats, with kv4's cache and with its own ones.

    Runs in vLLM's environment."""
    settings: dict[str, object] = {
        "tensor_parallel_size": tp,
        "enforce_eager": eager,
        "gpu_memory_utilization": memory,
    }
    if batched_tokens is not None:
        settings["max_num_batched_tokens"] = batched_tokens
    if dtype is not options.DType.auto:
        settings["dtype"] = dtype.value
    chosen = bench_vllm.Chosen(model, shape, kinds, layers)
    if requests is None:
        bench_vllm.steps(chosen, cases, steps, settings, json_)
    else:
        bench_vllm.served(chosen, requests, rate, longest, settings, json_)
