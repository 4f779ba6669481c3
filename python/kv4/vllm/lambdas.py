"""Lambda of a server's layers: from a calibration file, or measured on the first requests and kept for the next start.

Measured values are kept in the user's cache folder, one file per layer, under the model, the recipe and the rank, so
that a restarted server seals its pages as before.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from kv4 import Recipe
from kv4.calibration import Calibration, identity_of
from kv4.messages import mismatch
from kv4.models import cache_dir
from kv4.whole import written_whole

_log = logging.getLogger("vllm.kv4")  # vLLM shows what is logged below its own name


def check_fit(calibration: Calibration, layers: int, kv_heads: int, head_dim: int, folder: str) -> None:
    """Raises ValueError naming the calibration unless it has lambda of all the model's layers and heads.

    folder: the model's; its identity is compared where it is a folder."""
    if calibration.layers != layers:
        raise ValueError(mismatch("calibration", f"one of a model of {layers} layers", calibration.layers))
    for layer in range(layers):
        shape = list(calibration.lambda_of("key", layer).shape)
        if shape != [kv_heads, head_dim]:
            raise ValueError(mismatch(f"calibration: layer.{layer}.key.lambda", [kv_heads, head_dim], shape))
    if calibration.model and (Path(folder) / "config.json").is_file():
        calibration.check_model(folder)


def own_heads(heads: int, rank: int, ranks: int) -> slice:
    """The KV heads of a rank: a part of them, or one that several ranks hold."""
    if heads >= ranks:
        return slice(rank * (heads // ranks), (rank + 1) * (heads // ranks))
    head = rank * heads // ranks
    return slice(head, head + 1)


def digest_of(model: str, revision: str | None, config: str) -> str:
    """Identifies a model: by configuration and weights where `model` is a folder, else by name and configuration."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return str(identity_of(folder)["digest"])
    digest = hashlib.sha256(repr((model, revision, config)).encode())
    if folder.is_file():
        with folder.open("rb") as stream:
            digest.update(stream.read(1 << 24))
        digest.update(str(folder.stat().st_size).encode())
    return digest.hexdigest()[:32]


class Kept:
    """Measured lambda of one layer, float32 [kv_heads, d], in a file of its own."""

    def __init__(self, digest: str, recipe: Recipe, layer: str, rank: int, ranks: int) -> None:
        which = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        name = layer if ranks == 1 else f"{layer}.{rank}of{ranks}"
        self.path = cache_dir() / "vllm" / f"{digest}-{which}" / f"{name}.npy"

    def load(self, kv_heads: int, head_dim: int) -> np.ndarray | None:
        """None where there is none yet, or one that does not fit, which is logged; it is then measured again."""
        try:
            found = np.load(self.path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            return self._unfit(error)
        if found.dtype != np.float32 or found.shape != (kv_heads, head_dim):
            return self._unfit(mismatch("lambda", f"float32 [{kv_heads}, {head_dim}]", f"{found.dtype} {found.shape}"))
        if not (np.isfinite(found).all() and (found > 0).all()):
            return self._unfit("lambda: expected finite positive numbers")
        return found

    def _unfit(self, why: Any) -> None:
        _log.warning("kv4: %s is set aside, and lambda measured again: %s", self.path, why)

    def save(self, found: np.ndarray) -> None:
        """Written atomically. A folder that cannot be written to is logged once per layer, and nothing is kept."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path) as stream:
                np.save(stream, np.ascontiguousarray(found, np.float32), allow_pickle=False)
        except OSError as error:
            _log.warning("kv4: lambda is not kept for the next start: %s", error)
