"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file at `path`, to write to. It is another file until the block has ended without an exception, and has
    reached the disk by then: what was at `path` before is there until the new one is whole. Errors: OSError."""
    path = Path(path)
    other = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(other, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(other, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            other.unlink()
        raise
    if os.name == "posix":  # the new name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
