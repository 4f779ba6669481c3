"""A GGUF file as a HuggingFace folder.

transformers loads a GGUF file by dequantising it, which takes a minute, and the loaded model refuses
``save_pretrained`` because it counts as quantised. Its weights are therefore moved into a plain model of the
same configuration, which saves and later loads like any other.

Weights are stored as float32 unless asked otherwise: a dequantised Q4_K weight is a product of a half-precision
scale, a 6-bit factor and a 4-bit code minus a second such product, which neither bfloat16 nor float16 holds.
Rounding it would make another model than the file's; and a float32 file is mapped into memory without conversion.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from .errors import ModelError
from .progress import Progress, silent
from .tensors import check_tensors

DTYPES = ("float32", "float16", "bfloat16")

_READINGS = 6  # header reads, for progress: names, shapes, tokenizer, settings twice, weights

# End-of-turn and end-of-text tokens; a GGUF file names only one. As in llama.cpp, any of them that the vocabulary
# has ends generation.
_END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>",
    "<|return|>", "<|call|>",
)  # fmt: skip


def convert(gguf: Path, folder: Path, title: str, dtype: str = "float32", progress: Progress = silent) -> None:
    """Writes config, weights, tokenizer and generation settings of ``gguf`` into ``folder``.

    ``title`` is what errors call the file.
    """
    if dtype not in DTYPES:
        raise ModelError("dtype", "one of " + ", ".join(DTYPES), dtype)
    check_magic(gguf, title)
    try:
        import accelerate  # noqa: F401
        import gguf as gguf_package  # noqa: F401
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as missing:
        wanted = "torch, transformers, accelerate and gguf to convert a GGUF file"
        raise ModelError("environment", wanted, str(missing)) from None

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    try:
        with _quiet(), _one_reading(progress):
            check_tensors(gguf, title, AutoConfig.from_pretrained(**source))
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded = AutoModelForCausalLM.from_pretrained(
                **source, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
            )
    except ModelError:
        raise
    except Exception as refusal:  # third-party readers raise all kinds of exceptions for a damaged file
        said = " ".join(str(refusal).split()) or type(refusal).__name__
        raise ModelError(f"model file {title}", "a GGUF file that transformers can load", said) from refusal
    progress("save", 0, 1)
    plain = _plain(loaded)
    del loaded
    plain.generation_config = _generation_config(plain, tokenizer)
    with _quiet():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _drop_paths(folder)
    progress("save", 1, 1)


def check_magic(gguf: Path, title: str) -> None:
    """Rejects files that are not GGUF before anything slow starts."""
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"model file {title}", "a GGUF file (it begins with b'GGUF')", f"{magic!r} at its start")


def _plain(loaded: Any) -> Any:
    """The loaded weights in a model of the same class without quantisation settings."""
    import copy

    import torch

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True, strict=True)
    plain.tie_weights()
    return plain.eval()


def _generation_config(model: Any, tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    vocabulary = tokenizer.get_vocab()
    first = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ends = first + sorted({vocabulary[t] for t in _END_TOKENS if t in vocabulary} - set(first))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) != 1 else ends[0],
        pad_token_id=pad,
    )


def _drop_paths(folder: Path) -> None:
    """Takes the temporary folder's name out of the saved settings."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if not path.exists():
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path", "gguf_file", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _one_reading(progress: Progress) -> Iterator[None]:
    """transformers parses the file's header once each for settings, weights and tokenizer: share one parse.

    Dequantisation is counted on the way for ``progress``.
    """
    import gguf as package

    readings: dict[str, Any] = {}
    open_reader = package.GGUFReader
    dequantise = package.dequantize
    asked = done = 0

    def reader(path: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        key = str(path)
        if key not in readings:
            readings[key] = open_reader(path, *args, **kwargs)
        asked += 1
        progress("read", min(asked, _READINGS), _READINGS)
        return readings[key]

    @functools.wraps(dequantise)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        total = max((len(r.tensors) for r in readings.values()), default=done)
        progress("convert", min(done, total), total)
        return dequantise(*args, **kwargs)

    progress("read", 0, _READINGS)
    with mock.patch.object(package, "GGUFReader", reader), mock.patch.object(package, "dequantize", counted):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' progress bars and messages."""
    from transformers.utils import logging

    bars: Callable[[], bool] = getattr(logging, "is_progress_bar_enabled", lambda: True)
    shown, level = bars(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The GGUF loader's bar ignores that switch.
        with mock.patch.dict("os.environ", {"TQDM_DISABLE": "1"}), _without_gguf_bar():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _without_gguf_bar() -> Iterator[None]:
    try:
        from transformers import modeling_gguf_pytorch_utils as loader
    except ImportError:  # a later transformers may load GGUF elsewhere
        yield
        return
    if not hasattr(loader, "tqdm"):
        yield
        return
    with mock.patch.object(loader, "tqdm", lambda items, *args, **kwargs: items):
        yield
