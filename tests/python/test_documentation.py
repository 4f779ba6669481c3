"""What README.md and docs/ tell people to type: Python snippets run, commands of `kv4` parse, make targets exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL_FOLDERS = ('"..."', '"path/to/model"')


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers and mlx-lm read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    where = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_model.byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, bos_token_id=0,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, eos_token_id=None, tie_word_embeddings=True,
        )
    ).save_pretrained(where)  # fmt: skip
    tokenizer.save_pretrained(where)
    return where


def run(block: str, folder: Path, names: dict[str, Any]) -> None:
    for placeholder in MODEL_FOLDERS:
        block = block.replace(placeholder, repr(str(folder)))
    exec(compile(block, "<snippet>", "exec"), names)


def transformers_names(names: dict[str, Any]) -> None:
    """What the page's text names beside its snippets: a prompt that goes on where another ends."""
    prompt = torch.randint(2, 200, (1, 150), generator=torch.Generator().manual_seed(0))
    names["inputs"] = {"input_ids": prompt}
    names["longer_inputs"] = {"input_ids": torch.cat([prompt, prompt[:, :20]], dim=1)}


def encoder_decoder(names: dict[str, Any]) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    names["own"] = {name: names[name] for name in ("model", "inputs")}
    names["model"] = BartForConditionalGeneration(
        BartConfig(
            vocab_size=200, d_model=128, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    names["inputs"] = {"input_ids": torch.randint(4, 200, (1, 100)), "max_new_tokens": 4}


def decoder_again(names: dict[str, Any]) -> None:
    names.update(names.pop("own"))


def cuda_alone(names: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        raise pytest.skip.Exception("no CUDA device")


# Per page, in order: the preparation of names that each snippet needs; a new snippet must be added here. Snippets of a
# page share their names, as for a reader.
Setup = Callable[[dict[str, Any]], None] | None


def nothing(names: dict[str, Any]) -> None:
    pass


SNIPPETS: dict[str, list[Setup]] = {
    "README.md": [nothing, nothing, None, nothing],
    "docs/huggingface.md": [
        nothing, transformers_names, nothing, encoder_decoder, decoder_again, nothing, cuda_alone,
    ],
    "docs/mlx.md": [nothing],
    "docs/vllm.md": [None],
}  # fmt: skip


def test_every_snippet_is_known_here():
    found = {name_of(page): len(blocks(page, "python")) for page in PAGES}
    assert {name: count for name, count in found.items() if count} == {k: len(v) for k, v in SNIPPETS.items()}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # they write files
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "10000"))
    names: dict[str, Any] = {}
    for setup, block in zip(SNIPPETS[name], blocks(ROOT / name, "python"), strict=True):
        if setup is None:
            is_what_the_benchmark_passes(block)
            continue
        if "mlx" in block:
            pytest.importorskip("mlx_lm")
        try:
            setup(names)
        except pytest.skip.Exception:
            compile(block, name, "exec")
            continue
        run(block, folder, names)
        if "out" in names and isinstance(names["out"], np.ndarray):
            assert np.isfinite(names["out"]).all()


def is_what_the_benchmark_passes(block: str) -> None:
    """vLLM has an environment of its own. Its snippet selects kv4 as `kv4 bench vllm` does, which tests/vllm runs."""
    from kv4.bench.vllm import KINDS

    (call,) = (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call))
    assert {word.arg: ast.literal_eval(word.value) for word in call.keywords} == KINDS["kv4"]


def commands() -> Iterator[tuple[str, str, bool]]:
    """(page, command line, whether all of it is there): from shell blocks, and between backticks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("kv4 "):
                    yield name_of(page), line.split(" #")[0].strip(), True
        for line in re.findall(r"`(kv4 [^`\n]+)`", FENCE.sub("", text)):
            yield name_of(page), line, False


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import typer

    from kv4.cli.commands import app

    monkeypatch.chdir(tmp_path)
    tree = typer.main.get_command(app)
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", lambda self, context: None)
    found = list(commands())
    assert {name for name, _, whole in found if whole} >= {"docs/quality.md"}
    wrong = []
    for page, line, whole in found:
        # For a fragment only option names are checked, not whether required arguments are there.
        arguments = shlex.split(line)[1:] + ([] if whole else ["--help"])
        try:
            tree.main(arguments, prog_name="kv4", standalone_mode=False)
        except Exception as error:
            wrong.append(f"{page}: {line}: {error}")
    assert not wrong, "\n".join(wrong)


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", makefile, re.MULTILINE) for name in line.split()}


def test_make_targets_exist():
    named = {
        (name_of(page), target)
        for page in PAGES
        for target in re.findall(r"`make ([a-z][a-z-]*)[ `]", page.read_text(encoding="utf-8"))
    } | {
        (name_of(page), line.split()[1])
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("make ")
    }
    assert len(named) > 20
    assert {pair for pair in named if pair[1] not in targets()} == set()


def test_workflows_call_what_is_there():
    """Their steps are make targets and scripts of this repository, which a developer can run."""
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text(encoding="utf-8")
        called = set(re.findall(r"make: ([a-z-]+)", text)) | set(re.findall(r"run: make ([a-z-]+)", text))
        assert called <= targets(), f"{workflow.name}: {called - targets()}"
        for path in re.findall(r"(?:bash|python|sh) ((?:scripts|tests|\.ci)/[\w/.]+)", text):
            assert (ROOT / path).is_file(), f"{workflow.name}: {path}"
        steps = set(re.findall(r"setup_system\.sh (\w+)", text))
        for listed in re.findall(r"for step in ([\w ]+);", text):
            steps |= set(listed.split())
        system = (ROOT / "scripts" / "setup_system.sh").read_text(encoding="utf-8")
        assert steps <= set(re.findall(r"^  (\w+)\)$", system, re.MULTILINE)), f"{workflow.name}: {steps}"
