"""Runs .metal files without Apple hardware and checks what they do. docs/metal.md: how, and what it cannot find."""

from .build import MODES, asan_environment, asan_library, build, check_spaces, compiler, load
from .module import INOUT, INPUT, OUTPUT, Buffer, Module, Output, Run, Stats
from .source import MetalError

__all__ = [
    "INOUT", "INPUT", "MODES", "OUTPUT", "Buffer", "MetalError", "Module", "Output", "Run", "Stats", "asan_environment",
    "asan_library", "build", "check_spaces", "compiler", "load",
]  # fmt: skip
