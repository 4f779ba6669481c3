"""llama.cpp's own programs on kv4's cache: its test of architectures, perplexity and divergence, its benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import BUILT, CPU, EXACT, PACKED, Model, read, run

CONTEXT = ["-c", "512", "-ub", "128", "--chunks", "1", "-t", "2", "-fa", "on"]


def architectures(programs: Path, more: dict[str, str], device: str) -> tuple[int, str]:
    """How many of its tests ran, none of which failed, and all that was said."""
    environment = {**more, "LD_PRELOAD": str(BUILT / "libkv4-load-backends.so"), "KV4_LLAMA_BACKENDS": str(programs)}
    command = [programs / "test-llama-archs", "-s", "1", "-b", device]
    summary, output = read(command, environment, r"Summary: all (\d+) test\(s\) passed")
    return int(summary[1]), output


def test_as_many_architectures_pass_with_the_device_as_without(programs: Path) -> None:
    """Against llama.cpp's own logits: on prompts, on rows that see later ones, and read back from a file."""
    own, _ = architectures(programs, CPU, "CPU")
    ours, output = architectures(programs, PACKED, "KV4")
    assert ours == own > 100
    assert "4-bit KV cache" in output


@pytest.fixture(scope="module")
def base(programs: Path, model: Model, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma's logits on f16 keys and values."""
    file = tmp_path_factory.mktemp("base") / "logits"
    run([programs / "llama-perplexity", "-m", model("gemma-3-270m"), "-f", text, *CONTEXT, "--save-all-logits", file])
    return file


def divergence(programs: Path, model: Model, base: Path, more: dict[str, str], *arguments: str) -> float:
    """Mean KL divergence from the base, nats per token."""
    command = [programs / "llama-perplexity", "-m", model("gemma-3-270m"), *CONTEXT, "--kl-divergence"]
    found, _ = read([*command, "--kl-divergence-base", base, *arguments], more, r"Mean\s+KLD:\s+(-?[\d.]+)")
    return float(found[1])


def test_what_is_packed_diverges_less_than_q4_0(programs: Path, model: Model, base: Path) -> None:
    packed = divergence(programs, model, base, PACKED)
    assert packed < divergence(programs, model, base, CPU, "-ctk", "q4_0", "-ctv", "q4_0") / 2
    assert packed > abs(divergence(programs, model, base, EXACT))


def test_llama_bench_runs_on_the_device(programs: Path, model: Model) -> None:
    arguments = ["-m", model("llama"), "-p", "64", "-n", "8", "-d", "512", "-r", "1", "-t", "2", "-fa", "1"]
    done = run([programs / "llama-bench", *arguments], PACKED)
    assert "KV4" in done.stdout and done.stdout.count("@ d512") == 2, done.stdout
