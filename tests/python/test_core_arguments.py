"""Arguments of wrong types, of `kv4._core`: one line that names the argument, what was expected and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest

import kv4
from kv4 import _core
from kv4.arguments import wrong_arguments

DIMS = {"kv_heads": 2, "head_dim_k": 64, "head_dim_v": 64}
ONE = np.zeros((1, 2, 1, 64), np.float32)


def cache() -> kv4.Cache:
    return kv4.Cache(kv4.Recipe(), **DIMS)


CALLS = [
    (lambda: kv4.Cache(2, 128, recipe=7), "arguments of Cache(): expected at most 1 by position; got 2"),
    (
        lambda: kv4.Cache(recipe=kv4.Recipe(), kv_heads=2, head_dim_k=64),
        "head_dim_v: expected a whole number; got none",
    ),
    (lambda: kv4.Cache(**DIMS), "recipe: expected a value; got none"),
    (lambda: kv4.Cache(kv4.Recipe(), **DIMS, recipe=kv4.Recipe()), "recipe: expected a value; got two of them"),
    (
        lambda: kv4.Cache(kv4.Recipe(), **DIMS, window=3),
        "window: expected an argument of Cache(), one of recipe, dtype, kv_heads, head_dim_k, head_dim_v, "
        "sliding_window, lambda_k, lambda_v, matrix_k, matrix_v, backend; got an unknown one",
    ),
    (lambda: kv4.Cache(kv4.Recipe(), **{**DIMS, "kv_heads": "two"}), "kv_heads: expected a whole number; got str"),
    (lambda: kv4.Cache(kv4.Recipe(), **{**DIMS, "kv_heads": 2.5}), "kv_heads: expected a whole number; got float"),
    (lambda: kv4.Cache(kv4.Recipe(), **{**DIMS, "kv_heads": [2]}), "kv_heads: expected a whole number; got list"),
    (lambda: kv4.Cache(kv4.Recipe(), **DIMS, dtype=np.float32), "dtype: expected a string; got type"),
    (
        lambda: kv4.Cache(kv4.Recipe(), **{**DIMS, "kv_heads": 1 << 40}),
        "kv_heads, head_dim_k, head_dim_v: expected values in range; got one out of it",
    ),
    (lambda: cache().append(ONE), "v: expected a value; got none"),
    (lambda: cache().append(ONE, ONE, [(0, 1)]), "arguments of append(): expected at most 2 by position; got 3"),
    (lambda: cache().append(ONE, ONE, rows=[0]), "rows: expected Sequence[tuple[int, int]] or None; got list"),
    (lambda: cache().attend(ONE, ONE, scale="1"), "scale: expected a number; got str"),
    (lambda: cache().attend(ONE, ONE, causal=1), "causal: expected True or False; got int"),
    (lambda: cache().crop("a"), "length: expected a whole number; got str"),
    (lambda: cache().crop(0, 0.5), "row: expected a whole number or None; got float"),
    (lambda: cache().extend(kv4.Recipe()), "other: expected Cache; got Recipe"),
    (lambda: cache().save(3), "write: expected a function; got int"),
    (lambda: cache().nbytes(3), "arguments of nbytes(): expected at most 0; got 1"),
    (lambda: kv4.set_num_threads(None), "n: expected a whole number; got None"),
    (lambda: _core.PageFormat(None, dtype="float32", **DIMS), "recipe: expected a value; got None"),
    (lambda: kv4.Cache.append(3, ONE, ONE), "self of append(): expected an object of the class that has it; got int"),
    (lambda: _core.force_isa(7), "name: expected a string; got int"),
]


@pytest.mark.parametrize(("call", "says"), CALLS, ids=[says for _, says in CALLS])
def test_a_wrong_argument_is_named_in_one_line(call, says):
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value) == says


def functions():
    """Every function and method of the module, by name."""
    for owner in (_core, *(x for x in vars(_core).values() if isinstance(x, type))):
        for name, function in vars(owner).items():
            if hasattr(function, "__nb_signature__") and callable(function):
                yield f"{owner.__name__}.{name}", function


def test_no_function_answers_in_more_than_a_line():
    answered = {}
    for name, function in functions():
        with pytest.raises(TypeError) as raised:
            function(*[object()] * 40)
        answered[name] = str(raised.value)
    assert len(answered) > 60
    assert {name: says for name, says in answered.items() if not re.fullmatch(r"arguments of .*; got \d+", says)} == {}


def test_what_is_said_in_other_words_is_kept_in_one_line():
    assert wrong_arguments("f(): incompatible function arguments.\n  1. f(x)\n  2. f(y)") == (
        "f(): incompatible function arguments. 1. f(x) 2. f(y)"
    )
