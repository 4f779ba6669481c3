"""Files that are written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kv4.messages import mismatch


def file_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path that names a file. Errors: ValueError."""
    if not isinstance(path, (str, os.PathLike)) or not Path(path).name:
        raise ValueError(mismatch("path", "the name of a file", repr(path)))
    return Path(path)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file to write to, which replaces `path` once the block has ended without an exception and its content
    has reached the disk; until then the old file stays. A process that is killed leaves its temporary file behind; the
    next write of `path` removes it. Errors: OSError."""
    path = file_path(path)
    if path.is_dir():
        raise IsADirectoryError(mismatch("path", "the name of a file", f"a folder, {path}"))
    _remove_abandoned(path)
    file, other = _locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(other, path)  # before the file is closed, and its lock gone
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            other.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _locked(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path`, locked while a living process has it open."""
    while True:
        other = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = open(other, "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if other.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file, other
        file.close()  # removed as abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of `path` whose writers are gone: those whose lock can be taken."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as found:
        for entry in found:
            if not name.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError), open(entry, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry)
