"""Checks for what clang accepts and Metal, PyTorch or MLX reject. Findings are "file:line: ..." lines.

Rules of the language (language): those of the Metal Shading Language that clang does not enforce, and the project's own
stricter ones. Rules of entry (torch, mlx): which kernels torch.mps.compile_shader can launch, and which can be the body
of an mlx.fast.metal_kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .source import Token, closing, split, words
from .translate import EXTENTS, SPACES, Kernel, Parameter, Translation

BANNED = {
    "double": "MSL has no double", "goto": "MSL has no goto", "new": "MSL has no new", "delete": "MSL has no delete",
    "virtual": "MSL has no virtual functions", "dynamic_cast": "MSL has no dynamic_cast", "typeid": "MSL has no typeid",
    "throw": "MSL has no exceptions", "try": "MSL has no exceptions", "catch": "MSL has no exceptions",
    "noexcept": "MSL has no exceptions", "thread_local": "MSL has no thread_local", "asm": "MSL has no asm",
    "std": "MSL has namespace metal, not std", "volatile": "volatile only weakens the checks here",
}  # fmt: skip
FLOAT = re.compile(r"(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?(?P<suffix>\w*)$")
MAX_BUFFERS = 31  # indices 0 to 30 of a Metal argument table
# What torch passes to `constant T&`: an int as int64, a float as float32, a bool as bool; others need arg_casts.
TORCH_SCALARS = {"long", "int64_t", "float", "bool"}
# Elements of MLX's arrays, by Metal's names for them.
MLX_TYPES = {
    "float", "half", "bfloat", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "bool",
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}  # fmt: skip


def lint_language(translation: Translation) -> list[str]:
    tokens = words(translation.tokens)
    found = []
    for i, token in enumerate(tokens):
        before, after = tokens[i - 1] if i else None, tokens[i + 1] if i + 1 < len(tokens) else None
        if token.kind == "word" and token.text in BANNED:
            found.append(f"{token.place}: {token.text}: {BANNED[token.text]}")
        elif token.kind == "number" and (literal := FLOAT.match(token.text)):
            if literal["suffix"].lower() not in ("f", "h", "bf"):
                found.append(f"{token.place}: {token.text}: expected a suffix, f or h; got none")
        elif token.text == "[" and _opens_lambda(before, after):
            found.append(f"{token.place}: MSL has no lambda expressions")
    return found + _unspaced_pointers(tokens) + _mixed_dimensions(translation)


def _mixed_dimensions(translation: Translation) -> list[str]:
    """Positions and sizes in the grid have one number of components in a kernel: Metal's vectors of them must agree."""
    found = []
    for k in translation.kernels:
        extents = [p for p in k.parameters if p.attribute in EXTENTS]
        sizes = {re.sub(r"\D", "", p.text.split()[0]) for p in extents}
        if len(sizes) > 1:
            what = ", ".join(f"{p.text} [[{p.attribute}]]" for p in extents)
            found.append(f"{k.place}: {k.name}: expected positions and sizes of one number of components; got {what}")
    return found


def _opens_lambda(before: Token | None, after: Token | None) -> bool:
    """[ after an operator or a bracket, and not [[ of an attribute."""
    if before is None or after is None or after.text == "[" or before.text == "[":
        return False
    return (
        before.kind == "sign" and before.text in ("=", "(", ",", "{", ";", "&&", "||", "?", ":")
    ) or before.text == "return"


def _unspaced_pointers(tokens: Sequence[Token]) -> list[str]:
    """Parameters of functions that are pointers or references without an address space."""
    found = []
    for i, token in enumerate(tokens):
        if token.text != "(" or i < 2 or tokens[i - 1].kind != "word" or tokens[i - 2].kind not in ("word", "sign"):
            continue
        end = closing(tokens, i)
        # A definition: a name with a type before it, parameters, a body.
        if end + 1 >= len(tokens) or tokens[end + 1].text != "{" or not _is_type(tokens[i - 2]):
            continue
        for part in split(tokens[i + 1 : end]):
            text = [t.text for t in part]
            if ("*" in text or "&" in text) and not SPACES & set(text):
                found.append(f"{part[0].place}: {' '.join(text)}: expected an address space; got none")
    return found


def _is_type(token: Token) -> bool:
    keywords = {"if", "for", "while", "switch", "return", "else"}
    return (token.kind == "word" and token.text not in keywords) or token.text in (">", "*", "&")


def lint_torch(translation: Translation) -> list[str]:
    """torch.mps.compile_shader(text).kernel(*arguments, threads=..., group_size=...): arguments by position."""
    found = _function_constants(translation, "torch")
    for k in translation.kernels:
        buffers = [p for p in k.parameters if p.is_buffer]
        for position, p in enumerate(buffers):
            if p.index != position:
                found.append(
                    f"{p.place}: torch: {k.name}: {p.name}: expected buffer {position}, its position; got {p.index}"
                )
            found += _torch_argument(k, p)
        found += _attributes(k, "torch")
        found += _too_many(k, buffers, "torch")
    return found


def _torch_argument(k: Kernel, p: Parameter) -> list[str]:
    if p.space != "constant" or "*" in p.text:
        return []
    kind = re.sub(r"\b(constant|const)\b|&", " ", p.text).split()[:-1]
    if len(kind) == 1 and kind[0] in TORCH_SCALARS:
        return []
    return [f"{p.place}: torch: {k.name}: {p.name}: expected long, float or bool; got {' '.join(kind)}"]


def lint_mlx(translation: Translation) -> list[str]:
    """mlx.fast.metal_kernel(source=body) writes the signature itself: an input is `const device T*` (in the constant
    space if it has fewer than 8 elements, a reference if it has no dimensions), an output `device T*`."""
    found = _function_constants(translation, "mlx")
    for k in translation.kernels:
        buffers = [p for p in k.parameters if p.is_buffer]
        for p in buffers:
            kind = re.sub(r"\b(device|constant|const)\b|[*&]", " ", p.text).split()[:-1]
            if len(kind) != 1 or kind[0] not in MLX_TYPES:
                came = " ".join(kind)
                found.append(f"{p.place}: mlx: {k.name}: {p.name}: expected an array's type; got {came}")
        if not any(p.space == "device" and "const" not in p.text.split() for p in buffers):
            found.append(f"{k.place}: mlx: {k.name}: expected an output; got none")
        found += _attributes(k, "mlx")
        found += _too_many(k, buffers, "mlx")
    return found


def _attributes(k: Kernel, host: str) -> list[str]:
    """Neither host can give a threadgroup argument its length."""
    what = "expected threadgroup memory declared in the kernel; got [[threadgroup]]"
    return [f"{p.place}: {host}: {k.name}: {p.name}: {what}" for p in k.parameters if p.attribute == "threadgroup"]


def _too_many(k: Kernel, buffers: Sequence[Parameter], host: str) -> list[str]:
    if len(buffers) <= MAX_BUFFERS:
        return []
    return [f"{k.place}: {host}: {k.name}: expected at most {MAX_BUFFERS} buffers; got {len(buffers)}"]


def _function_constants(translation: Translation, host: str) -> list[str]:
    return [f"{t.place}: {host}: expected no function constants, which it cannot set; got one"
            for t in translation.tokens if t.text == "function_constant"]  # fmt: skip


def lint(translation: Translation) -> list[str]:
    return lint_language(translation) + lint_torch(translation) + lint_mlx(translation)
