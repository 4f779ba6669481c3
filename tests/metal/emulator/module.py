"""Runs kernels of a compiled module on numpy arrays.

    module = Module(build("src/metal/attend.metal", "check"))
    done = module.run("attend", threads=(32 * 8, 4), group=(32, 1), arguments=[q, codes, scales, out, 5])
    assert not done.reports, done.reports

Arguments stand in the order of the kernel's buffers. An array that the kernel only reads is copied in; one that it may
write is copied in and back. Output(array): the kernel has to write before it reads. An int is passed as int64, a float
as float32, a numpy scalar as its own type. A Buffer keeps its memory from run to run, as a numpy array.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

INPUT, INOUT, OUTPUT = range(3)
RESULTS = ["ran", "no such kernel", "wrong number of arguments", "bad launch", "stopped"]


class _Size(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class _Launch(ctypes.Structure):
    _fields_ = [("grid", _Size), ("group", _Size), ("seed", ctypes.c_uint64), ("flags", ctypes.c_uint32),
                ("group_bytes", ctypes.c_uint32 * 8)]  # fmt: skip


@dataclass
class Stats:
    """EmuStats of runtime/abi.h."""

    threads: int = 0
    groups: int = 0
    simd_operations: int = 0
    group_barriers: int = 0
    device_read: int = 0
    device_written: int = 0
    device_read_unique: int = 0
    device_written_unique: int = 0
    group_read: int = 0
    group_written: int = 0
    group_bytes: int = 0


class _Stats(ctypes.Structure):
    _fields_ = [(f.name, ctypes.c_uint64) for f in fields(Stats)]


@dataclass
class Output:
    """An array that the kernel fills: its bytes count as uninitialised until written."""

    array: np.ndarray


@dataclass
class Run:
    result: str  # one of RESULTS
    stats: Stats
    reports: list[str]  # "kind: text", each once
    findings: int  # number of reports before duplicates are dropped

    @property
    def kinds(self) -> list[str]:
        return sorted({line.split(":", 1)[0] for line in self.reports})


class Buffer:
    """Device memory of one module. `offset`: bytes from a multiple of 256, as a slice of a larger tensor has."""

    def __init__(self, module: Module, array: np.ndarray, kind: int, name: str, offset: int = 0) -> None:
        self.module, self.bytes = module, array.nbytes
        self.address = module.library.emu_alloc(max(array.nbytes, 1), name.encode(), kind, offset)
        if not self.address:
            raise MemoryError(f"{name}: no memory for {array.nbytes} bytes")
        memory = (ctypes.c_uint8 * max(array.nbytes, 1)).from_address(self.address)
        self.array = np.frombuffer(memory, np.uint8)[: array.nbytes].view(array.dtype).reshape(array.shape)
        if kind != OUTPUT:
            self.array[...] = array

    def free(self) -> None:
        if self.address:
            self.module.library.emu_free(ctypes.c_void_p(self.address))
            self.address = 0


class Module:
    def __init__(self, path: str | Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emu_alloc.restype = ctypes.c_void_p
        self.library.emu_alloc.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32]
        self.library.emu_free.argtypes = [ctypes.c_void_p]
        self.library.emu_reports.restype = ctypes.c_char_p
        self.library.emu_report_count.restype = ctypes.c_uint64
        self.path = Path(path)
        described = json.loads(self.path.with_suffix(".json").read_text())
        self.kernels: dict[str, list] = {name: kernel["buffers"] for kernel in described for name in kernel["names"]}

    def buffer(self, array: np.ndarray, kind: int = INOUT, name: str = "buffer", offset: int = 0) -> Buffer:
        return Buffer(self, np.asarray(array), kind, name, offset)

    def set_constant(self, name: str, value: np.generic | bool) -> None:
        raw = np.asarray(value).tobytes()
        if not self.library.emu_set_constant(name.encode(), raw, ctypes.c_size_t(len(raw))):
            raise KeyError(f"{name}: expected a function constant of {len(raw)} bytes; this module has none")

    def run(
        self,
        kernel: str,
        threads: Sequence[int] | int,
        group: Sequence[int] | int,
        arguments: Sequence,
        seed: int = 0,
        flush: bool = False,
        threadgroup: Sequence[int] = (),
        offset: int = 0,
    ) -> Run:
        """Dispatches `threads` threads in threadgroups of `group` and waits. `threadgroup`: bytes of each
        [[threadgroup(n)]]. `flush`: fp32 denormals become 0. `offset`: of every array that is copied in."""
        if kernel not in self.kernels:
            raise KeyError(f"kernel: expected one of {', '.join(self.kernels)}; got {kernel}")
        declared = self.kernels[kernel]
        if len(arguments) != len(declared):
            raise ValueError(f"arguments: expected {len(declared)} of {kernel}; got {len(arguments)}")
        temporary: list[tuple[Buffer, np.ndarray | None]] = []
        pointers = (ctypes.c_void_p * max(len(arguments), 1))()
        try:
            for i, (argument, parameter) in enumerate(zip(arguments, declared, strict=True)):
                if not isinstance(argument, Buffer):
                    argument = self._temporary(argument, parameter, temporary, offset)
                pointers[i] = argument.address
            return self._launch(kernel, threads, group, pointers, len(arguments), seed, flush, threadgroup)
        finally:
            for buffer, back in temporary:
                if back is not None:
                    back[...] = buffer.array
                buffer.free()

    def _temporary(self, value, parameter, temporary: list, offset: int) -> Buffer:
        written, name = bool(parameter and parameter["written"]), parameter["name"] if parameter else "unused"
        fill = isinstance(value, Output)
        if fill:
            value = value.array
        if isinstance(value, bool):
            value = np.bool_(value)
        elif isinstance(value, int):
            value = np.int64(value)
        elif isinstance(value, float):
            value = np.float32(value)
        if written and not isinstance(value, np.ndarray):
            raise TypeError(f"{name}: expected an array, as the kernel writes it; got {type(value).__name__}")
        kind = OUTPUT if fill else INOUT if written else INPUT
        at = offset if isinstance(value, np.ndarray) else 0
        buffer = Buffer(self, np.asarray(value), kind, name, at)
        temporary.append((buffer, value if written else None))
        return buffer

    def _launch(self, kernel, threads, group, pointers, count, seed, flush, threadgroup) -> Run:
        launch = _Launch(_size(threads), _size(group), seed, 1 if flush else 0)
        for i, length in enumerate(threadgroup):
            launch.group_bytes[i] = length
        stats = _Stats()
        self.library.emu_clear()
        result = self.library.emu_run(kernel.encode(), ctypes.byref(launch), pointers, count, ctypes.byref(stats))
        return Run(
            RESULTS[result],
            Stats(**{f.name: getattr(stats, f.name) for f in fields(Stats)}),
            self.library.emu_reports().decode().splitlines(),
            self.library.emu_report_count(),
        )


def _size(value: Sequence[int] | int) -> _Size:
    values = (value,) if isinstance(value, int) else tuple(value)
    return _Size(*values, *[1] * (3 - len(values)))
