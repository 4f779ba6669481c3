"""What models say on kv4's cache beside what they say on llama.cpp's own, by every way to the same cells."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import TINY

from conftest import CPU, EXACT, PACKED, Probe, held, said

REAL = ["gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
PROMPTS = """\
The capital of France is
def fibonacci(n):
Once upon a time there was a miller who had three sons
import numpy as np
Water boils at a temperature of
SELECT name, count(*) FROM orders
In the beginning the universe was created.
class Stack:
The three laws of thermodynamics say that
for (int i = 0; i < n; ++i)
My favourite recipe for bread needs
#include <vector>
The difference between a list and a tuple is
1, 1, 2, 3, 5, 8, 13,
Dear Sir or Madam, I am writing to
fn main() {
The moon is about 384,400 km from
It was the best of times, it was
git commit -m
To be, or not to be, that is"""


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts"
    file.write_text(PROMPTS)
    return file


def numbers(line: str) -> list[float]:
    return [float(x) for x in line.split()]


@pytest.mark.parametrize("options", ["", "-kvu"])
@pytest.mark.parametrize("name", TINY)
def test_the_exact_recipe_gives_llama_cpps_own_logits_to_the_bit(
    probe: Probe, text: Path, name: str, options: str
) -> None:
    """After a prompt, copied, restored, drafts taken back, half of it again, shifted, and two in a batch."""
    says, beside = probe(EXACT, name, "ways", text, "1500", options=options)
    assert says == probe(CPU, name, "ways", text, "1500", options=options)[0]
    assert len(says) == 12 and says["saved again"] == " the same bytes"
    assert said(beside) == [] and held(beside, "at the end")[1] == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (REAL[0], ""),
        (REAL[1], "-kvu"),
        pytest.param(REAL[0], "-kvu", marks=pytest.mark.slow),
        pytest.param(REAL[1], "", marks=pytest.mark.slow),
        pytest.param(REAL[2], "-kvu", marks=pytest.mark.slow),
    ],
)
def test_the_exact_recipe_answers_twenty_prompts_as_llama_cpps_own_cache(
    probe: Probe, prompts: Path, name: str, options: str
) -> None:
    says, _ = probe(EXACT, name, "prompts", prompts, options=options, tokens=8)
    assert says == probe(CPU, name, "prompts", prompts, options=options, tokens=8)[0]
    assert len([x for x in says if x.startswith("prompt at ")]) == 20


@pytest.mark.parametrize("name", [n for n in TINY if n != "head of 16"])
def test_packed_logits_are_as_near_as_four_bits_are(probe: Probe, text: Path, name: str) -> None:
    """Lloyd-Max with 16 levels leaves .0095 of a Gaussian's power. Keys and values of each layer bring it in,
    independently, and the residual stream only dilutes it."""
    ours, own = (probe(more, name, "ways", text, "1500")[0] for more in (PACKED, CPU))
    assert ours["greedy"].split()[0] == own["greedy"].split()[0]
    error = {}
    for when in ("logits of the prompt", "logits at the end"):
        a, b = numbers(ours[when]), numbers(own[when])
        if ours["greedy"] == own["greedy"] or when == "logits of the prompt":
            error[when] = math.dist(a, b) / math.hypot(*b)
    assert error and all(e < math.sqrt(0.0095 * 2 * TINY[name].layers) for e in error.values()), error
    assert max(error.values()) > 1e-4


@pytest.mark.parametrize("options", ["", "-kvu"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama"])
def test_a_packed_sequence_that_is_restored_is_saved_as_the_same_bytes(
    probe: Probe, text: Path, name: str, options: str
) -> None:
    says, beside = probe(PACKED, name, "ways", text, "1500", options=options)
    assert held(beside, "cleared")[1] > 0
    assert says["saved again"] == " the same bytes"


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama"])
def test_a_copied_stream_goes_on_as_the_one_it_was_copied_from(probe: Probe, text: Path, name: str) -> None:
    says, _ = probe(PACKED, name, "ways", text, "1500")
    assert says["copied sequence"] == says["greedy"]


def test_what_is_packed_takes_the_formats_bytes(probe: Probe, text: Path) -> None:
    """Two sequences at the end; each block is exact or a page."""
    exact, packed, space = held(probe(PACKED, "llama", "ways", text, "1500")[1], "at the end")
    own = held(probe(EXACT, "llama", "ways", text, "1500")[1], "at the end")[0]
    block = space / (4096 / 64)  # 2,048 cells a stream
    page = block * (8 + 2 * 16 / 64 + 16 / 64) / 2 / 16  # codes, a scale for each key and value of 64, the keys' mean
    pages = packed / page
    assert pages > 10 and pages == pytest.approx(round(pages), abs=0.02 * pages)
    # The first 4 cells of both streams are also stored exact.
    assert exact == pytest.approx(own - round(pages) * block + 2 * block * 4 / 64, abs=0.02)


@pytest.mark.parametrize("more", [EXACT, PACKED], ids=["exact", "packed"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama"])
def test_saved_sequences_are_restored_or_refused_as_llama_cpps_own(
    probe: Probe, text: Path, tmp_path: Path, name: str, more: dict[str, str]
) -> None:
    """Whole from a file; truncated, with flipped bits and with infinities in their rows from memory."""
    ours, _ = probe(more, name, "sessions", text, "900", tmp_path / "state")
    own, _ = probe(CPU, name, "sessions", text, "900", tmp_path / "state")
    assert ours["refused"] == own["refused"] and " 6 cut" in own["refused"]
    assert own["loaded"] == own["greedy"]
    if more is EXACT:
        assert ours == own
