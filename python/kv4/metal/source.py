"""The Metal kernels as one text, as compilers without an include path want them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from kv4 import _core

_INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)".*$', re.MULTILINE)
_ATTEND = re.compile(r'^template \[\[host_name\("kv4_attend_d(\d+)_r\d+"\)\]\].*\n', re.MULTILINE)
FILES = ("metal/rotate.metal", "metal/attend.metal", "metal/seal.metal")


def folder() -> Path:
    """Where the sources lie: in the project's own tree where kv4 is used in place, else beside the compiled module.
    Errors: FileNotFoundError."""
    tried = [Path(__file__).resolve().parents[2] / "../src", Path(_core.__file__).parent / "metal_source"]
    for place in tried:
        if (place / FILES[0]).is_file():
            return place
    raise FileNotFoundError(f"{FILES[0]}: expected in one of {', '.join(map(str, tried))}; found in none")


@functools.cache
def text(head_dim: int) -> str:
    """All entry points, those of attention for `head_dim` alone; every quoted include in its place, once."""
    root, done = folder(), set()

    def read(name: str) -> str:
        if name in done:
            return ""
        done.add(name)
        return _INCLUDE.sub(lambda match: read(match.group(1)), (root / name).read_text(encoding="utf-8"))

    whole = "\n".join(read(name) for name in FILES)
    return _ATTEND.sub(lambda match: match.group(0) if int(match.group(1)) == head_dim else "", whole)
