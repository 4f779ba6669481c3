"""`kv4 generate`: text from a model with a chosen cache."""

from __future__ import annotations

import dataclasses
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from kv4.cli import options
from kv4.cli.chat import talk, words
from kv4.cli.output import mebibytes, out, plain_errors, write_json


class CacheName(str, Enum):
    kv4 = "kv4"
    trellis = "trellis"
    fp16 = "fp16"
    paper = "paper"
    exact = "exact"


@plain_errors
def generate(
    model: Annotated[str, typer.Argument(help="A name of `kv4 models`, a HuggingFace folder or a GGUF file.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A UTF-8 file that holds the prompt.")] = None,
    cache: Annotated[
        CacheName,
        typer.Option(
            help="kv4: 4 bits. trellis: 4 bits with a third less error, on the CPU. fp16: the model's own cache, in "
            "its dtype. paper: the recipe of arXiv 2605.05699. exact: kv4's kernels on exact rows."
        ),
    ] = CacheName.kv4,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file for --cache kv4.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A file of `kv4 calibrate`, with its own recipe, for --cache kv4.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="A budget of bits per value, all-in, for --cache kv4; with --calibration one of the file's."),
    ] = None,
    refined: Annotated[
        int | None, typer.Option(min=0, max=2, help="Keys of a page with a second row of codes, for --cache kv4.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    device: options.Device = "cpu",
    dtype: Annotated[options.DType, typer.Option(help="auto: the device's fastest dtype.")] = options.DType.auto,
    greedy: Annotated[bool, typer.Option("--greedy/--sample", help="The likeliest token, or a sampled one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="With --sample; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample; 0: all tokens.")] = 0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="A chat: each line is a message, an empty line ends it.")
    ] = False,
    threads: options.Threads = None,
    json_: options.JsonFile = None,
) -> None:
    """Generate text, printed as it is produced; the last line has time and memory."""
    if interactive and json_:
        raise ValueError("--json: expected without --interactive; got both")
    text = (prompt or "") if interactive and file is None else read_prompt(prompt, file)
    own = cache is CacheName.fp16
    if own and recipe is not None:
        raise ValueError("--recipe: expected with --cache kv4 only; got --cache fp16")
    if calibration is not None and (cache is not CacheName.kv4 or recipe is not None or interactive):
        raise ValueError("--calibration: expected with --cache kv4, without --recipe and --interactive; got more")
    if bits is not None and calibration is None and (cache is not CacheName.kv4 or recipe is not None):
        raise ValueError("--bits: expected with --cache kv4, without --recipe; got more")
    if refined is not None and (cache is not CacheName.kv4 or calibration is not None):
        raise ValueError("--refined: expected with --cache kv4, without --calibration; got more")
    used = None if own else options.load_recipe(cache.value, recipe)
    if refined is not None:
        used = dataclasses.replace(used, refined=refined)
    if bits is not None and calibration is None:
        used = _budgeted(used, bits)
    given = {} if calibration is None else _calibrated(calibration, bits, model)
    used = given.pop("recipe", used)
    options.set_threads(threads)
    where = options.torch_device(device)
    loaded, tokenizer = options.load(model, options.torch_dtype(dtype, where), where)

    import torch

    from kv4.bench.generate import KV4, OWN, attention, new_cache
    from kv4.bench.memory import cache_bytes, fp16_bytes
    from kv4.bench.text import encode
    from kv4.hf.cache import CACHE_ARGUMENT

    settings = _settings(max_new_tokens, not greedy and temperature > 0, temperature, top_p, top_k)
    torch.manual_seed(seed)
    if interactive:
        talk(loaded, tokenizer, OWN if own else KV4, used, text, settings)
        return
    if chat:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    else:
        ids = encode(tokenizer, text)
    ids = ids.to(where)
    if ids.shape[1] == 0:
        raise ValueError("prompt: expected at least one token; got an empty text")
    held = new_cache(loaded, OWN if own else KV4, used, **given)
    stream = words(tokenizer)
    with attention(loaded, OWN if own else KV4, None if given else used):
        made = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_ARGUMENT: held},
            streamer=stream,
            **settings,
        )
    tokens = made.shape[1] - ids.shape[1]
    begin, first, last = stream.times[0], stream.times[1], stream.times[-1]
    seen = held.get_seq_length()
    figures = {
        "model": model,
        "cache": cache.value,
        "device": options.device_title(where),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt_tokens": ids.shape[1],
        "tokens": tokens,
        "prefill_ms": 1e3 * (first - begin),
        "prefill_ms_per_token": 1e3 * (first - begin) / ids.shape[1],
        "decode_ms_per_token": 1e3 * (last - first) / (tokens - 1) if tokens > 1 else None,
        "cache_tokens": seen,
        "cache_bytes": cache_bytes(held),
        "fp16_bytes": fp16_bytes(loaded.config, seen),
    }
    out.print(summary(figures), style="dim", soft_wrap=True)
    if json_:
        write_json({**figures, "token_ids": made[0, ids.shape[1] :].tolist()}, json_)


def _budgeted(recipe: Any, bits: float) -> Any:
    try:
        return dataclasses.replace(recipe, bits=bits)
    except ValueError as error:
        raise ValueError(f"--bits: {error}") from None


def _calibrated(file: Path, bits: float | None, model: str) -> dict[str, Any]:
    """What KV4Cache takes of a calibration. Errors: ValueError or OSError naming the option."""
    from kv4.calibration import load

    try:
        return load(file, options.model_folder(model)).arguments(bits)
    except (ValueError, OSError) as error:
        raise type(error)(f"--calibration: {error}") from None


def _settings(tokens: int, drawn: bool, temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Of generate()."""
    return {
        "max_new_tokens": tokens,
        "do_sample": drawn,
        "temperature": temperature if drawn else None,
        "top_p": top_p if drawn else None,
        "top_k": top_k if drawn else None,
    }


def summary(f: dict[str, Any]) -> str:
    decode = "-" if f["decode_ms_per_token"] is None else f"{f['decode_ms_per_token']:.2f}"
    ratio = f["fp16_bytes"] / f["cache_bytes"]
    return (
        f"{f['prompt_tokens']} + {f['tokens']} tokens in {f['dtype']}; "
        f"prefill {f['prefill_ms_per_token']:.2f} ms/token, decode {decode} ms/token; "
        f"cache {f['cache']} {mebibytes(f['cache_bytes'])} = "
        f"fp16's {mebibytes(f['fp16_bytes'])} / {ratio:.2f}"
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("--prompt, --file: expected one of them; got both")
    source = "--prompt"
    if file is not None:
        source, prompt = "--file", options.read_utf8("--file", file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise ValueError("--prompt: expected --prompt, --file or text on stdin; got none")
        source, prompt = "stdin", sys.stdin.read()
    if not prompt:
        raise ValueError(f"{source}: expected some text; got an empty one")
    return prompt
