"""Replays launches that a test program recorded (KV4_METAL_RECORD, runtime/record.cpp) on another build."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .module import INOUT, INPUT, OUTPUT, Buffer, Module, Run

NULL = 0xFFFFFFFF


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    flags: int
    group_bytes: tuple[int, ...]
    buffers: list[tuple[int, bytes] | None]  # kind, contents before the launch; None: a null pointer

    @property
    def threads(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def read(path: Path) -> Launch:
    data = path.read_bytes()
    fields = struct.unpack_from("<6IQI8I4x", data)
    at = struct.calcsize("<6IQI8I4x")
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    buffers: list[tuple[int, bytes] | None] = []
    for _ in range(count):
        kind, size = struct.unpack_from("<IQ", data, at)
        at += 12
        buffers.append(None if kind == NULL else (kind, data[at : at + size]))
        at += size
    return Launch(path.name.split(".")[0], fields[:3], fields[3:6], fields[7], fields[8:16], buffers)


def replay(module: Module, launch: Launch, seed: int = 0) -> tuple[Run, list[bytes]]:
    """Runs it. Returns the run, and the contents of writable buffers afterwards, b"" for read-only ones."""
    buffers: list[Buffer | _Null] = []
    for i, held in enumerate(launch.buffers):
        if held is None:
            buffers.append(_Null())
            continue
        parameter = module.kernels[launch.kernel][i]
        name = parameter["name"] if parameter else f"buffer {i}"
        kind = {INPUT: INPUT, INOUT: INOUT, OUTPUT: OUTPUT}[held[0]]
        buffers.append(module.buffer(np.frombuffer(held[1], np.uint8), kind, name))
    try:
        done = module.run(
            launch.kernel, launch.grid, launch.group, buffers,
            seed=seed, flush=bool(launch.flags & 1), threadgroup=launch.group_bytes,
        )  # fmt: skip
        after = [b"" if held is None or held[0] == INPUT else buffer.array.tobytes()
                 for held, buffer in zip(launch.buffers, buffers, strict=True)]  # fmt: skip
        return done, after
    finally:
        for buffer in buffers:
            buffer.free()


class _Null(Buffer):
    def __init__(self) -> None:
        self.address = 0

    def free(self) -> None:
        pass
