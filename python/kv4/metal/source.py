"""The Metal kernels as text, for compilers without an include path: whole, or cut into headers and the bodies of entry
points, as `mlx.fast.metal_kernel` wants them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from kv4 import _core

_INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)".*$', re.MULTILINE)
_ATTEND = re.compile(r'^template \[\[host_name\("kv4_attend_d(\d+)_r\d+"\)\]\].*\n', re.MULTILINE)
_KERNEL = re.compile(r"^(?:template <([^>]*)>\n)?kernel void (\w+)\(", re.MULTILINE)
_BUFFER = re.compile(r"device (const )?(\w+)\* (\w+) \[\[buffer\((\d+)\)\]\]")
_POSITION = re.compile(r"(uint3?) (\w+) \[\[(\w+)\]\]")
FILES = ("metal/rotate.metal", "metal/attend.metal", "metal/seal.metal")
# Attributes that MLX declares as uint3 (Metal lets a kernel ask for fewer components).
_TRIPLES = ("thread_position_in_grid", "threadgroup_position_in_grid")


def folder() -> Path:
    """The folder of the sources: in the source tree for an editable install, else beside the compiled module.
    Errors: FileNotFoundError."""
    tried = [Path(__file__).resolve().parents[2] / "../src", Path(_core.__file__).parent / "metal_source"]
    for place in tried:
        if (place / FILES[0]).is_file():
            return place
    raise FileNotFoundError(f"{FILES[0]}: expected in one of {', '.join(map(str, tried))}; found in none")


def _read(name: str, done: set[str]) -> str:
    """The file with every quoted include expanded, except those in `done`."""
    if name in done:
        return ""
    done.add(name)
    return _INCLUDE.sub(lambda match: _read(match.group(1), done), (folder() / name).read_text(encoding="utf-8"))


@functools.cache
def text(head_dim: int) -> str:
    """All entry points, those of attention for `head_dim` alone; every quoted include in its place, once."""
    done: set[str] = set()
    whole = "\n".join(_read(name, done) for name in FILES)
    return _ATTEND.sub(lambda match: match.group(0) if int(match.group(1)) == head_dim else "", whole)


@dataclass(frozen=True)
class Entry:
    """An entry point for a host that writes the signature itself. Its buffers are `inputs`, then `outputs`, in the
    order of their declaration; `source` gives them the names and types of the kernel's own text, which follows.
    `header`: what it needs before, without comments, since MLX reads all of the text again at every call."""

    name: str
    template: tuple[str, ...]  # names of its int parameters
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str


def _closing(text: str, start: int, pair: str) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {pair[0]: 1, pair[1]: -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"source: expected the end of what {pair[0]} opens; got none")


def _bare(text: str) -> str:
    """Strips comments, indentation and empty lines."""
    lines = (line.strip() for line in re.sub(r"//.*", "", text).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


@functools.cache
def entries() -> dict[str, Entry]:
    """Every entry point by its name in the text: kv4_attend is one, with D and R."""
    found = {}
    for name in FILES:
        whole = re.sub(r"//.*", "", (folder() / name).read_text(encoding="utf-8"))
        done: set[str] = set()
        header = _bare("".join(_read(included, done) for included in _INCLUDE.findall(whole)))
        for match in _KERNEL.finditer(whole):
            end = _closing(whole, match.end() - 1, "()")
            parameters = whole[match.end() : end]
            body = whole[end + 1 : _closing(whole, whole.index("{", end), "{}")].strip().removeprefix("{")
            lines, inputs, outputs = [], [], []
            for const, kind, label, _ in _BUFFER.findall(parameters):
                (inputs if const else outputs).append(f"{label}_buffer")
                lines.append(f"device {const}{kind}* {label} = (device {const}{kind}*){label}_buffer;")
            for kind, label, attribute in _POSITION.findall(parameters):
                part = ".x" if kind == "uint" and attribute in _TRIPLES else ""
                lines.append(f"const {kind} {label} = {attribute}{part};")
            template = tuple(x.split()[-1] for x in match.group(1).split(",")) if match.group(1) else ()
            text = "\n".join(f"  {line}" for line in lines) + body.rstrip() + "\n"
            found[match.group(2)] = Entry(match.group(2), template, tuple(inputs), tuple(outputs), text, header)
    return found
