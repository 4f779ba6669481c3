"""Results that outlive a run: one line of JSON for each window and variant, appended as soon as it is known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from kv4.evaluate.scores import TokenScores

# Part of every key: a change of what is measured, or of a recipe's arithmetic, makes old results unreadable, not wrong.
_VERSION = 3


def digest(data: Any) -> str:
    """32 hex digits of anything that JSON can hold, or of token ids."""
    if isinstance(data, torch.Tensor):
        content = data.to(torch.int64).numpy().tobytes()
    else:
        content = json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:32]


class State:
    """A file of results, or none (path None): nothing is then kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._found[entry["key"]] = entry
                except (ValueError, RecursionError, KeyError, TypeError):
                    continue  # the line that a killed run was writing

    @staticmethod
    def key(**parts: Any) -> str:
        return digest({**parts, "version": _VERSION})

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry stored under `key`: its "scores" are TokenScores.from_dict's."""
        return self._found.get(key)

    def scores(self, key: str) -> TokenScores | None:
        entry = self._found.get(key)
        return TokenScores.from_dict(entry["scores"]) if entry else None

    def put(self, key: str, scores: TokenScores | None = None, **facts: Any) -> None:
        """Stores and appends; facts are for people and for `get`."""
        entry = {"key": key, **facts}
        if scores is not None:
            entry["scores"] = scores.to_dict()
        self._found[key] = entry
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and self.path.stat().st_size and self.path.read_bytes()[-1:] != b"\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
