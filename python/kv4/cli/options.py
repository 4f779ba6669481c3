"""Options and model loading that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from kv4.cli.output import model_steps, waiting
from kv4.cli.usage import new_file
from kv4.messages import mismatch

DEFAULT_MODEL = "gemma-3-270m"

Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch and kv4; torch's own number if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=new_file, help="Exact data to FILE, or to stdout for -."),
]


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def numbers(text: str, option: str) -> list[int]:
    """A comma-separated list of positive whole numbers; 1k means 1024."""
    found = []
    for part in text.split(","):
        digits, unit = (part.strip()[:-1], 1024) if part.strip().lower().endswith("k") else (part.strip(), 1)
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"{option}: expected positive numbers with commas between them; got {text!r}")
        found.append(int(digits) * unit)
    return sorted(set(found))


def names(text: str, option: str, known: list[str]) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name not in known:
            raise ValueError(f"{option}: expected names out of {', '.join(known)}; got {name!r}")
    return found


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    import kv4

    torch.set_num_threads(threads)
    kv4.set_num_threads(threads)


def torch_device(device: str) -> Any:
    """The torch device of --device. Errors: ValueError with the reason where kv4 cannot use it or it does not exist."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N; got {device!r}")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise ValueError(f"--device: expected one of the {count} CUDA devices that torch finds here; got {device!r}")
    from kv4.hf.device import why_no_device

    reason = why_no_device(found)
    if reason:
        raise ValueError(f"--device: expected a device that kv4 has kernels for; got {device!r}{reason}")
    return torch.device("cuda", found.index or 0)


def device_title(device: Any) -> str:
    import torch

    return "cpu" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)} ({device})"


def torch_dtype(dtype: DType, device: Any = None) -> Any:
    """auto: bfloat16 on CUDA and on CPUs with bfloat16 arithmetic, float32 otherwise (where bfloat16 is slower)."""
    import torch

    if dtype is not DType.auto:
        return getattr(torch, dtype.value)
    if device is not None and device.type == "cuda":
        return torch.bfloat16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def load_recipe(cache: str, file: Path | None) -> Any:
    """A kv4.Recipe for --cache kv4, trellis, paper or exact, or from --recipe FILE."""
    from kv4 import Recipe

    if file is not None:
        if cache != "kv4":
            raise ValueError(f"--recipe: expected with --cache kv4 only; got --cache {cache}")
        if not file.is_file():
            raise FileNotFoundError(f"--recipe: expected a file; got {file}")
        try:
            return Recipe.from_file(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"--recipe: {error}") from None
    return {"kv4": Recipe, "trellis": Recipe.trellis, "paper": Recipe.paper, "exact": Recipe.exact}[cache]()


def read_utf8(option: str, path: Path) -> str:
    """The text of a file. Errors: ValueError or OSError naming the option."""
    if not path.is_file():
        raise FileNotFoundError(mismatch(option, "a file", path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"{path}, with the byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(mismatch(option, "a file of UTF-8 text", byte)) from None
    except OSError as error:
        raise OSError(mismatch(option, "a file that can be read", f"{path}: {error.strerror}")) from None


def gguf_file(model: str) -> Path:
    """A GGUF file as given, or that of a name of `kv4 models`."""
    from kv4 import models as store

    if Path(model).expanduser().is_file():
        return Path(model).expanduser()
    with model_steps() as report:
        return store.pull_gguf(model, report)


def model_folder(model: str) -> Path:
    """A HuggingFace folder for a name of `kv4 models`, a folder or a GGUF file; fetches a named model if missing."""
    from kv4 import models

    with model_steps() as report:
        return models.resolve(model, report)


def load(model: str, dtype: Any, device: Any = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer), on `device`, in eval mode under torch's own attention. Errors: ModelError with what
    transformers says of a damaged or incomplete folder."""
    from kv4.models import ModelError

    folder = model_folder(model)
    with waiting(f"loading {model}"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        except MemoryError:
            raise
        except Exception as refusal:  # readers of others' raise all kinds of exceptions for a damaged folder
            said = " ".join(str(refusal).split()) or type(refusal).__name__
            raise ModelError(f"model folder {folder}", "one that transformers can load", said) from refusal
    return loaded.to(device).eval(), tokenizer
