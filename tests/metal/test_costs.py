"""What docs/metal_model.md says of the kernels, counted anew: bytes, lane-instructions and the claims made of them."""

from __future__ import annotations

import math

import pytest

from measure import cost, row_cost
from model import CHIPS, MODELS, step


@pytest.mark.parametrize(("dim", "rows"), [(128, 4), (256, 4), (64, 1)])
def test_a_packed_token_costs_its_bytes_and_little_arithmetic_beside_its_products(dim: int, rows: int) -> None:
    c = cost(dim, rows)
    assert c.bytes == pytest.approx(dim + 4 + 2 * dim / 64)  # codes, two scales, a 64th of the mean
    products = 2 * dim * rows
    assert products <= c.by_class["float"] < 1.06 * products
    # A look-up a pair of channels and side: a load, three integers, two widenings. A load of four numbers a row per 16.
    assert c.lane_instructions - products < 6.5 * dim + 0.3 * products + 60 * rows + 60


def test_no_other_division_than_of_the_call() -> None:
    assert cost(128, 4).by_class.get("divide", 0) == 0


@pytest.mark.parametrize("dim", [80, 128])
def test_a_row_is_rotated_by_few_instructions(dim: int) -> None:
    without, matrix, butterfly = (row_cost(dim, 3, rotated) for rotated in (0, 1, 2))
    for kernel in (0, 1):
        # One channel a thread takes two loads, the product, an index and the loop's end for each: more than this.
        assert dim * dim < matrix[kernel] - without[kernel] < 5 * dim * dim
        # Radix 2: dim / 4 butterflies a stage, each 10 operations, 6 loads and stores and as many addresses and more,
        # some 26; and as much again for signs, the split and what a thread does once.
        assert butterfly[kernel] - without[kernel] < 13 * dim * math.log2(dim)


@pytest.mark.parametrize("name", ["Gemma-3 1B", "Qwen2.5-1.5B", "SmolLM2-1.7B"])
def test_the_model_says_what_the_document_says(name: str) -> None:
    g = next(m for m in MODELS if m.name == name)
    for chip in CHIPS:
        for tokens in (256, 512, 1024, 2048, 4096):
            _, fp16, kv4 = step(g, tokens, chip)
            assert fp16 / kv4 >= 1, (chip, tokens)
        _, fp16, kv4 = step(g, 32768, chip)
        assert g.group > 4 or fp16 / kv4 >= 2.5, chip
