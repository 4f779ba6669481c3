"""Total size of caches that share memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def total_bytes(cores: Iterable[Any]) -> int:
    """nbytes() of all of these caches of the core, or of kv4.metal: what several share counts once."""
    own, shared = 0, {}
    for core in cores:
        mine = {identity: nbytes for identity, nbytes, _ in core.shared()}
        own += core.nbytes() - sum(mine.values())
        shared |= mine
    return own + sum(shared.values())
