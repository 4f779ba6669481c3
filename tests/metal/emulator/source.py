"""The text of a .metal file: preprocessed, cut into tokens that know their file and line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
METAL_VERSION = 310  # MSL 3.1, the first with bfloat: macOS 14

TOKEN = re.compile(
    r"(?P<marker>^#[^\n]*)"
    r"|(?P<space>\s+)"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)"
    r"|(?P<string>\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')"
    r"|(?P<sign>::|->|<<=|>>=|[-+*/%&|^=!<>]=|&&|\|\||<<|\+\+|--|.)",
    re.M | re.S,
)
MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')


class MetalError(Exception):
    """What stops a kernel from being compiled: lines of "file:line: what was expected; what came"."""

    stage = "translator"  # the stage that failed: also "static", "compiler"


@dataclass
class Token:
    kind: str  # marker, space, word, number, string or sign; ">>" comes as two signs
    text: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


def preprocess(path: Path, compiler: str, include: Sequence[Path] = (), define: Sequence[str] = ()) -> str:
    """`path` with its own headers and macros expanded; <metal_stdlib> and the like are left out. No macro of this
    machine is defined, as none is when a Mac compiles for its GPU."""
    command = [compiler, "-E", "-undef", "-nostdinc", "-std=c++14", "-x", "c++", "-isystem", str(HERE / "stub")]
    command += ["-D__METAL__=1", f"-D__METAL_VERSION__={METAL_VERSION}", "-D__clang__=1"]
    command += [f"-I{folder}" for folder in include] + [f"-D{macro}" for macro in define]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise MetalError(done.stderr.strip())
    return done.stdout


def tokenise(text: str, file: str) -> list[Token]:
    tokens, line = [], 1
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup or "", match.group()
        tokens.append(Token(kind, piece, file, line))
        if kind == "marker" and (marker := MARKER.match(piece)):
            line, file = int(marker.group(1)) - 1, marker.group(2)
        line += piece.count("\n")
    return tokens


def closing(tokens: Sequence[Token], start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    opened = tokens[start].text
    depth = 0
    for i in range(start, len(tokens)):
        text = tokens[i].text
        if text == opened:
            depth += 1
        elif text == pairs[opened]:
            depth -= 1
            if depth == 0:
                return i
        elif opened == "<" and text in ";{}":
            break
    raise MetalError(f"{tokens[start].place}: expected the end of what {opened} opens; got none")


def split(tokens: Sequence[Token], separator: str = ",") -> list[list[Token]]:
    """Cuts at separators outside all brackets; template arguments count as bracketed."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.text in "([{<" and token.kind == "sign":
            depth += 1
        elif token.text in ")]}>" and token.kind == "sign":
            depth -= 1
        if token.text == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts if any(words(part) for part in parts) else []


def words(tokens: Sequence[Token]) -> list[Token]:
    """Without white space and line markers."""
    return [token for token in tokens if token.kind not in ("space", "marker")]


def joined(tokens: Sequence[Token]) -> str:
    return " ".join(t.text for t in words(tokens))
