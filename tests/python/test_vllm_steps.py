"""kv4.vllm without vLLM: a step's pages and pieces, settings, versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kv4 import Recipe
from kv4.vllm.choice import supported_module
from kv4.vllm.settings import recipe_of
from kv4.vllm.steps import PAGE, plan


def walk(cuts: list[int]) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """A sequence in steps that end at `cuts`: for each position what it reads from pages, and the ranges sealed."""
    sealed, ranges, at = {}, [], 0
    for end in cuts:
        step = plan(np.array([0, end - at]), np.array([end]), True)
        if step.end[0] > step.begin[0]:
            ranges.append((int(step.begin[0]), int(step.end[0])))
        (span,) = step.spans
        rows = np.diff(span.queries)
        assert span.rows == slice(0, end - at) and rows.sum() == end - at and rows.max() <= PAGE
        for count, length, done in zip(rows, step.piece_lengths, step.piece_sealed, strict=True):
            for position in range(length - count, length):
                sealed[position] = int(done)
        at = end
    return sealed, ranges


def test_what_a_token_reads_from_pages_follows_from_its_position() -> None:
    whole, _ = walk([300])
    assert whole == {p: max(p // PAGE - 1, 0) * PAGE for p in range(300)}
    assert walk(list(range(1, 301)))[0] == whole
    assert walk([1, 64, 65, 127, 129, 300])[0] == whole


@pytest.mark.parametrize("cuts", [[300], list(range(1, 301)), [63, 64, 128, 192, 300], [1, 200, 201, 257, 300]])
def test_every_page_is_sealed_once_in_the_step_that_fills_it(cuts: list[int]) -> None:
    _, ranges = walk(cuts)
    assert [page for begin, end in ranges for page in range(begin, end, PAGE)] == [0, 64, 128, 192]


def test_sequences_of_a_batch_have_pieces_of_their_own_and_padding_has_none() -> None:
    # A prompt of 130 tokens, a single token behind 70, a row of padding: beside a prompt it has no piece.
    step = plan(np.array([0, 130, 131, 131]), np.array([130, 71, 1]), True)
    assert step.source.tolist() == [0, 0, 0, 1]
    assert [span.queries.tolist() for span in step.spans] == [[0, 64, 128, 130, 131]] and not step.single
    assert step.piece_lengths.tolist() == [64, 128, 130, 71]
    assert step.piece_sealed.tolist() == [0, 0, 64, 0]
    assert step.begin.tolist() == [0, 64, 0] and step.end.tolist() == [128, 64, 0]
    assert step.rows == 131 and step.most_pages == 2


def test_on_a_device_tokens_that_decode_are_not_laid_out_as_pieces_of_prompts() -> None:
    # Three that decode, then 130 more tokens of a prompt, too few for the host's own attention.
    queries, lengths = np.array([0, 1, 2, 3, 133]), np.array([71, 500, 64, 330])
    spans = plan(queries, lengths, True, leave=131).spans
    assert [span.rows for span in spans] == [slice(0, 3), slice(3, 133)]
    assert [span.most_queries for span in spans] == [1, 64]
    assert [span.rows for span in plan(queries, lengths, True).spans] == [slice(0, 133)]


def test_a_workspace_is_asked_for_by_powers_of_two_that_hold_the_step() -> None:
    step = plan(np.array([0, 200, 201]), np.array([300, 1000]), True)
    needed = {
        "sequences": step.pieces,
        "most_pages": 3,
        "most_queries": PAGE,  # of a piece: no call but attention's depends on them
        "longest": 1000,
        "all": step.piece_lengths.sum(),
    }
    assert step.limits.keys() == needed.keys()
    for name, x in needed.items():
        assert x <= step.limits[name] < 2 * x and step.limits[name].bit_count() == 1


def test_exact_rows_are_one_piece_a_sequence_and_nothing_is_sealed() -> None:
    step = plan(np.array([0, 130, 131]), np.array([130, 71]), False)
    assert step.source.tolist() == [0, 1] and step.piece_lengths.tolist() == [130, 71]
    assert not step.piece_sealed.any() and step.most_pages == 0


@pytest.mark.parametrize(
    ("additional", "environment", "message"),
    [
        ({"kv4": {"recipe": "int3"}}, None, "additional_config.kv4.recipe: expected kv4, exact"),
        ({"kv4": {"recipe": 4}}, None, "additional_config.kv4.recipe: .* got 4"),
        ({"kv4": {"reciep": "kv4"}}, None, 'additional_config.kv4: expected an object with "recipe"'),
        ({}, "nowhere.json", "KV4_VLLM_RECIPE: .* got 'nowhere.json'"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(
    additional: dict, environment: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("KV4_VLLM_RECIPE", environment)
    with pytest.raises(ValueError, match=message):
        recipe_of(additional)


def test_the_recipe_is_the_config_s_else_the_environment_s_else_kv4_s_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert recipe_of({}) == recipe_of(None) == Recipe()
    monkeypatch.setenv("KV4_VLLM_RECIPE", "exact")
    assert recipe_of({}) == Recipe.exact() and recipe_of({"kv4": {"recipe": "kv4"}}) == Recipe()
    Recipe(sinks=8).to_file(tmp_path / "own.json")
    assert recipe_of({"kv4": {"recipe": str(tmp_path / "own.json")}}).sinks == 8


@pytest.mark.parametrize("recipe", [Recipe.paper(), Recipe(window=128)])
def test_a_recipe_that_no_server_can_keep_to_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe.to_file(tmp_path / "own.json")
    with pytest.raises(ValueError, match="additional_config.kv4.recipe"):
        recipe_of({"kv4": {"recipe": str(tmp_path / "own.json")}})


@pytest.mark.parametrize("version", ["0.31.0", "0.33.1", "1.0"])
def test_another_version_of_vllm_is_refused_with_those_that_work(version: str) -> None:
    assert supported_module("0.32.5") == "kv4.vllm.v0_32" and supported_module("0.26.0") == "kv4.vllm.v0_26"
    with pytest.raises(NotImplementedError, match=rf"vllm: expected version 0\.26\.x, 0\.32\.x; got {version}"):
        supported_module(version)
