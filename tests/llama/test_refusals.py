"""Settings and models that kv4 cannot serve: one line that says what to change, and llama.cpp's own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import BUILT, CPU, EXACT, PACKED, Probe, held, said


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            {"GGML_BACKEND_PATH": str(BUILT / "libggml-kv4-for-another.so")},
            "ggml: expected 0.0.0, for which this was built; got ",
        ),
        ({**EXACT, "KV4_RECIPE": "none such"}, "KV4_RECIPE: expected kv4, trellis, exact or paper; got none such"),
        ({**EXACT, "KV4_VERBOSE": "loud"}, "KV4_VERBOSE: expected 0 or 1; got loud"),
        ({**EXACT, "KV4_CPU_ISA": "none such"}, "KV4_CPU_ISA: expected"),
        (
            {**PACKED, "KV4_CALIBRATION": "none/such"},
            "KV4_CALIBRATION: expected a file that can be read; got none/such",
        ),
        ({**EXACT, "KV4_CALIBRATION": "any"}, "KV4_CALIBRATION: expected none beside KV4_RECIPE=exact; got any"),
    ],
)
def test_settings_that_cannot_serve_say_so_and_llama_cpp_goes_on(
    probe: Probe, text: Path, setting: dict[str, str], line: str
) -> None:
    says, beside = probe(setting, "llama", "ways", text, "1500")
    ours = said(beside)
    assert len(ours) == 1 and line in ours[0] and ours[0].endswith("llama.cpp goes on with its own cache"), beside
    assert says == probe(CPU, "llama", "ways", text, "1500")[0]


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("llama", "-fa off", "flash attention is off: the cache stays exact; -fa on packs it"),
        ("llama", "-nkvo", "holds no cache: the model has none of keys and values, or llama.cpp keeps it to itself "),
        ("llama", "-ngl 0", "holds no cache: the model has none of keys and values, or llama.cpp keeps it to itself "),
        ("llama", "-ctk q8_0 -ctv q8_0", "not packed, stays exact: cache type: expected f16 or bf16; got q8_0"),
        ("llama", "-ctk q4_0 -ctv f16", "not packed, stays exact: cache type: expected f16 or bf16; got q4_0"),
        ("llama", "-ctk f32 -ctv f32", "not packed, stays exact: cache type: expected f16 or bf16; got f32"),
        ("head of 16", "", "not packed, stays exact: head_dim"),
    ],
)
def test_what_is_not_packed_is_named_once_and_llama_cpps_own(
    probe: Probe, text: Path, name: str, options: str, line: str
) -> None:
    ours, beside = probe(PACKED, name, "ways", text, "1500", options=options)
    assert ours == probe(CPU, name, "ways", text, "1500", options=options)[0]
    lines = said(beside)
    assert len(lines) == 1 and lines[0].startswith(line), lines


def calibration(path: Path, layers: int, shape: tuple[int, int], **more: np.ndarray) -> dict[str, str]:
    random = np.random.default_rng(0)
    tensors = {f"layer.{i}.key.lambda": np.exp(random.normal(0, 0.5, shape)).astype(np.float32) for i in range(layers)}
    save_file({**tensors, **more}, path, {"format": "kv4-calibration", "version": "1", "recipe": "{}"})
    return {**PACKED, "KV4_CALIBRATION": str(path)}


def test_a_calibration_of_the_model_is_what_pages_are_made_with(probe: Probe, text: Path, tmp_path: Path) -> None:
    measured, beside = probe(calibration(tmp_path / "fits", 2, (2, 64)), "llama", "ways", text, "1500")
    learnt, _ = probe(PACKED, "llama", "ways", text, "1500")
    assert said(beside) == [] and held(beside, "at the end")[1] > 0
    assert measured["logits of the prompt"] != learnt["logits of the prompt"]


@pytest.mark.parametrize(
    ("layers", "shape", "got"), [(2, (2, 32), "[2, 32]"), (2, (1, 64), "[1, 64]"), (1, (2, 64), "none")]
)
def test_a_calibration_of_another_model_is_refused_in_a_line(
    probe: Probe, text: Path, tmp_path: Path, layers: int, shape: tuple[int, int], got: str
) -> None:
    _, beside = probe(calibration(tmp_path / "other", layers, shape), "llama", "ways", text, "1500")
    lines = said(beside)
    expected = "KV4_CALIBRATION: expected this model's lambda of keys, [2, 64] for this layer; got "
    assert len(lines) == 1 and f"not packed, stays exact: {expected}{got}" in lines[0], lines
