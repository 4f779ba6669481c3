"""`kv4 generate -i`: a chat on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tiny_model
from command import kv4, succeeded
from kv4.cli.chat import common

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("cache", ["kv4", "fp16", "exact"])
def test_a_chat_goes_on_and_says_what_the_full_context_would_hold(model: Path, tmp_path: Path, cache: str) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    result = succeeded("generate", folder, "-i", "-n", 5, "--cache", cache, stdin="first line\nsecond\n\n")
    costs = [line for line in " ".join(result.output.split()).split("at its full ")[1:]]
    assert len(costs) == 2, result.output
    (context,) = {line.split(" tokens")[0] for line in costs}
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert int(context.replace(",", "")) == config.max_position_embeddings
    # The first answer is that of a chat with the first message alone.
    once = succeeded("generate", folder, "-i", "-n", 5, "--cache", cache, stdin="first line\n")
    assert once.output.split("tokens:")[0] == result.output.split("tokens:")[0]


def test_a_model_without_a_chat_template_does_not_chat(model: Path) -> None:
    result = kv4("generate", model, "-i", stdin="hello\n")
    assert result.exit_code == 2
    assert "--interactive: expected a model with a chat template; got one without" in " ".join(result.output.split())


def test_a_chat_keeps_what_both_begin_with() -> None:
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([1, 2, 3], [1, 2, 3]) == 2  # the last token has to be computed
    assert common([], [1]) == 0
