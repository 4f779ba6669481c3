"""kv4 as the backend that owns the cache of an unpatched llama.cpp."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import BUILT, CPU, EXACT, PACKED, run

Probe = Callable[..., tuple[dict[str, str], str]]


def held(said: str, when: str) -> tuple[float, float, float]:
    """MiB that the larger of a model's caches held: exact, packed, and its address space."""
    lines = re.findall(rf"kv4: {when}: .*exact ([\d.]+) MiB, packed ([\d.]+) MiB\) of ([\d.]+) MiB", said)
    assert lines, said
    exact, packed, space = max(tuple(map(float, line)) for line in lines)
    return exact, packed, space


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            {"GGML_BACKEND_PATH": str(BUILT / "libggml-kv4-for-another.so")},
            "ggml: expected 0.0.0, for which this was built; got ",
        ),
        ({**EXACT, "KV4_RECIPE": "none such"}, "KV4_RECIPE: expected kv4, exact or paper; got none such"),
        ({**EXACT, "KV4_VERBOSE": "loud"}, "KV4_VERBOSE: expected 0 or 1; got loud"),
        ({**EXACT, "KV4_CPU_ISA": "none such"}, "KV4_CPU_ISA: expected"),
    ],
)
def test_what_cannot_serve_says_so_in_a_line_and_llama_cpp_goes_on(
    probe: Probe, setting: dict[str, str], line: str
) -> None:
    says, said = probe(setting)
    ours = [x for x in said.splitlines() if x.startswith("kv4:")]
    assert len(ours) == 1 and line in ours[0] and ours[0].endswith("llama.cpp goes on with its own cache"), said
    assert says == probe(CPU)[0]


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize(
    ("name", "size"), [("gemma-3-270m", 2000), ("qwen2.5-coder-0.5b", 800), ("qwen2.5-coder-1.5b", 300)]
)
def test_the_exact_recipe_is_llama_cpps_own_text(probe: Probe, name: str, size: int, unified: bool) -> None:
    """After a prompt, restored, drafts taken back, copied, half of it again, shifted, and two in a batch."""
    says, said = probe(EXACT, name, size, unified)
    assert says == probe(CPU, name, size, unified)[0]
    assert says["saved again"] == " the same bytes" and says["restored into another sequence"] == says["greedy"]
    assert held(said, "at the end")[1] == 0


@pytest.mark.parametrize("unified", [False, True])
def test_a_packed_sequence_that_is_restored_is_saved_as_the_same_bytes(probe: Probe, unified: bool) -> None:
    says, said = probe(PACKED, unified=unified)
    assert held(said, "cleared")[1] > 0
    assert says["saved again"] == " the same bytes"


def test_a_copied_stream_goes_on_as_the_one_it_was_copied_from(probe: Probe) -> None:
    says, _ = probe(PACKED)
    assert says["copied sequence"] == says["greedy"]


def test_what_is_packed_takes_the_formats_bytes(probe: Probe) -> None:
    """Two sequences at the end; each block is exact or a page, and a page of heads of 256 takes 4.1875 bits a value."""
    exact, packed, space = held(probe(PACKED)[1], "at the end")
    own = held(probe(EXACT)[1], "at the end")[0]
    block = space / (2 * 4096 / 64)
    page = block * (8 + 2 * 16 / 256 + 16 / 64) / 2 / 16
    pages = packed / page
    assert pages > 10 and pages == pytest.approx(round(pages), abs=0.01 * pages)
    # The first 4 cells of both streams lie exact beside their pages.
    assert exact == pytest.approx(own - round(pages) * block + 2 * block * 4 / 64, abs=0.02)


def perplexity(programs: Path, file: Path, text: Path, more: dict[str, str], *arguments: str) -> float:
    done = run(
        [
            programs / "llama-perplexity",
            "-m",
            file,
            "-f",
            text,
            "-c",
            "1024",
            "--chunks",
            "2",
            "-t",
            "2",
            "-fa",
            "on",
            *arguments,
        ],
        more,
    )
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)[1])


def test_perplexity_is_less_than_half_as_far_from_f16_as_that_of_q4_0(
    programs: Path, text: Path, model: Callable[[str], Path]
) -> None:
    file = model("gemma-3-270m")
    own = perplexity(programs, file, text, CPU)
    q4_0 = perplexity(programs, file, text, CPU, "-ctk", "q4_0", "-ctv", "q4_0")
    packed = perplexity(programs, file, text, PACKED)
    assert packed != own
    assert abs(math.log(packed / own)) < abs(math.log(q4_0 / own)) / 2


def test_a_cache_without_flash_attention_stays_exact_and_right(
    programs: Path, text: Path, model: Callable[[str], Path]
) -> None:
    file = model("gemma-3-270m")
    command = [
        programs / "llama-perplexity",
        "-m",
        file,
        "-f",
        text,
        "-c",
        "512",
        "--chunks",
        "1",
        "-t",
        "2",
        "-fa",
        "off",
    ]
    results = [run(command, more) for more in (CPU, PACKED)]
    own, ours = (re.search(r"Final estimate: PPL = ([\d.]+)", r.stdout + r.stderr)[1] for r in results)
    assert own == ours
    assert (results[1].stdout + results[1].stderr).count("kv4: flash attention is off") == 1


def test_quantised_cache_types_are_llama_cpps_own(programs: Path, text: Path, model: Callable[[str], Path]) -> None:
    file = model("gemma-3-270m")
    own = perplexity(programs, file, text, CPU, "-ctk", "q8_0", "-ctv", "q8_0")
    assert perplexity(programs, file, text, PACKED, "-ctk", "q8_0", "-ctv", "q8_0") == own


def test_every_architecture_passes_llama_cpps_own_test(programs: Path) -> None:
    more = {**PACKED, "LD_PRELOAD": str(BUILT / "libkv4-load-backends.so"), "KV4_LLAMA_BACKENDS": str(programs)}
    done = run([programs / "test-llama-archs", "-b", "KV4"], more)
    summary = re.search(r"Summary: all (\d+) test", done.stdout + done.stderr)
    assert summary and int(summary[1]) > 100, done.stdout[-2000:]
    assert "4-bit KV cache" in done.stdout + done.stderr
