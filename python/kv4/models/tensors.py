"""Checks that transformers can load every tensor of a GGUF file, with a clear error where it cannot.

Its loader skips tensors that it has no name for, initialises missing ones randomly, and reports mismatched shapes under
its own names. So names and shapes are compared before anything is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ModelError


def check_tensors(gguf: Path, title: str, config: Any) -> None:
    """Compares the file's tensors with the parameters of a model of `config`, in ggml's order of axes.

    Architectures whose tensors the loader splits or joins (experts, state spaces) are not looked at.
    Errors: ModelError naming the tensor.
    """
    expected = _expected(gguf, config)
    if expected is None:
        return
    import gguf as package

    found = {tensor.name: [int(n) for n in tensor.shape] for tensor in package.GGUFReader(gguf).tensors}
    for name, shape in expected.items():
        what = f"{name} of model file {title}"
        if name not in found:
            if name == "output.weight" and config.tie_word_embeddings:
                continue
            raise ModelError(what, f"a tensor of shape {shape}", "none of this name")
        if found[name] != shape:
            raise ModelError(what, f"shape {shape}", str(found[name]))
    for name, shape in found.items():
        if name not in expected:
            known = "tensors that transformers makes a model of"
            raise ModelError(f"{name} of model file {title}", known, f"one of shape {shape} that it would leave out")


def _expected(gguf: Path, config: Any) -> dict[str, list[int]] | None:
    """Shapes by GGUF name; None where they are not those of the model's parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        from transformers import modeling_gguf_pytorch_utils as loader

        plain = (loader.TensorProcessor, loader.LlamaTensorProcessor, loader.Gemma2TensorProcessor)
        processors, names_of = loader.TENSOR_PROCESSORS, loader.get_gguf_hf_weights_map
    except (ImportError, AttributeError):  # a later transformers may load GGUF elsewhere
        return None
    import gguf as package

    architecture = package.GGUFReader(gguf).fields["general.architecture"].contents()
    kind = processors.get(architecture, loader.TensorProcessor)
    if kind not in plain:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(reversed(value.shape)) for name, value in model.state_dict().items()}
    names = names_of(model, kind(config=config.to_dict()))
    return {name: shapes[own] for name, own in names.items() if own in shapes}
