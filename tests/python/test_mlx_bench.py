"""`kv4 bench mlx` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="kv4.mlx needs mlx and mlx-lm (pip install kv4[mlx])", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="kv4.mlx needs mlx-lm (pip install kv4[mlx])", exc_type=ImportError)

from typer.testing import CliRunner  # noqa: E402

import tiny_model  # noqa: E402
from kv4.bench import mlx as measurement  # noqa: E402
from kv4.cli import app  # noqa: E402


def save(folder: Path) -> Path:
    """The tiny model, with the name under which mlx-lm looks for its pattern of layers."""
    config = tiny_model.save(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window_pattern": 3}))
    return folder


def test_every_cache_has_a_row(tmp_path):
    folder = save(tmp_path / "model")
    target = tmp_path / "rows.json"
    arguments = ["bench", "mlx", "--model", str(folder), "--tokens", "384", "--generated", "8", "--json", str(target)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    own, exact, ours, quantised = json.loads(target.read_text())["rows"]
    assert own["kl"] == 0 and own["top1"] == 1 and own["same"] == 8
    assert abs(exact["kl"]) < 1e-6 and exact["top1"] == 1 and exact["same"] == 8
    assert 1e-7 < ours["kl"] < 0.05 and ours["top1"] > 0.9
    assert ours["nbytes"] < exact["nbytes"] and ours["nbytes"] < own["nbytes"]
    # mlx-lm quantises no rotating cache, and Gemma 3 has them.
    assert quantised["kl"] is None and "RotatingKVCache" in quantised["refused"]


def test_the_text_must_be_long_enough(tmp_path):
    model, tokenizer = measurement.load(save(tmp_path / "model"), "float32")
    with pytest.raises(ValueError, match="^text: expected at least 300 tokens"):
        measurement.run(model, tokenizer, tokens=300, generated=1, text="short")
