"""Files while things go wrong: a process killed as it saves, a full disk, a folder that may not be written to, two
programs on one model. What was there before is whole, and the error is one line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv4.whole import written_whole

TESTS = Path(__file__).parent
MOUNTS = sys.platform == "linux" and hasattr(os, "geteuid") and os.geteuid() == 0


def python(code: str, *arguments: object, **kwargs) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


KILLED = """
    import os, random, signal, sys, time
    sys.path.insert(0, sys.argv[2])
    import torch
    import hf_cases
    import kv4
    from kv4.hf import KV4Cache
    torch.set_num_threads(1)
    kv4.set_num_threads(1)
    path, rng = sys.argv[1], random.Random(int(sys.argv[3]))
    model = hf_cases.model_of("qwen3")
    model.set_attn_implementation("kv4")
    caches = []
    for tokens in (150, 1500):
        cache = KV4Cache(model.config)
        with torch.no_grad():
            model(input_ids=hf_cases.tokens_of(1, tokens), past_key_values=cache)
        caches.append(cache)
    caches[0].save(path)
    seen = set()
    for _ in range(15):
        child = os.fork()
        if child == 0:
            while True:
                for cache in caches:
                    cache.save(path)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(KV4Cache.load(path, model.config).get_seq_length())  # complete, or load would refuse it
    left = len(os.listdir(os.path.dirname(path)))
    caches[0].save(path)
    print(sorted(seen), left, *os.listdir(os.path.dirname(path)), sep=";")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")
def test_a_process_killed_as_it_saves_leaves_a_whole_session(tmp_path: Path):
    out, _ = finished(python(KILLED, tmp_path / "session", TESTS, 7))
    lengths, left, *files = out.strip().split(";")
    assert set(eval(lengths)) <= {150, 1500} and int(left) <= 2, out
    assert files == ["session"]


WRITES = """
    import sys
    from kv4.whole import written_whole
    with written_whole(sys.argv[1]) as file:
        file.write(b"half")
        print("half", flush=True)
        sys.stdin.readline()
        file.write(b" and half")
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path: Path):
    path, names = tmp_path / "session", lambda: {p.name for p in tmp_path.iterdir()}
    others = {".session.0123456789abcdef.tmp.bak", ".session.tmp", ".session.more.0123456789abcdef.tmp"}
    for name in others:
        (tmp_path / name).touch()
    killed, living = (python(WRITES, path, stdin=subprocess.PIPE) for _ in range(2))
    for process in (killed, living):
        assert process.stdout.readline() == "half\n"
    assert len(names()) == len(others) + 2
    killed.kill()
    killed.communicate()
    with written_whole(path) as file:
        file.write(b"whole")
        assert len(names()) == len(others) + 2  # the living one's and this one's
    assert path.read_bytes() == b"whole" and len(names()) == len(others) + 2
    living.communicate("\n", timeout=60)
    assert living.returncode == 0 and path.read_bytes() == b"half and half"
    assert names() == others | {"session"}


def test_a_new_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock, removed = fcntl.flock, []

    def late(file, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".session.*.tmp"))
            removed[0].unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with written_whole(tmp_path / "session") as file:
        file.write(b"whole")
    assert len(removed) == 1 and [p.name for p in tmp_path.iterdir()] == ["session"]
    assert (tmp_path / "session").read_bytes() == b"whole"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if not MOUNTS or subprocess.run(mount, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(disk: Path):
    path = disk / "session"
    with written_whole(path) as file:
        file.write(b"old" * 1000)
    with pytest.raises(OSError, match="No space left on device"), written_whole(path) as file:
        for _ in range(100):
            file.write(b"n" * 4096)
    assert path.read_bytes() == b"old" * 1000
    assert list(disk.iterdir()) == [path]
    with written_whole(path) as file:  # with space available again
        file.write(b"new" * 5000)
    assert path.read_bytes() == b"new" * 5000


def calibration():
    import torch

    from kv4 import Recipe
    from kv4.calibration import Calibration

    return Calibration(tensors={"layer.0.key.lambda": torch.ones(1, 64)}, recipe=Recipe(), model={"digest": "0"})


@pytest.mark.parametrize("kind", ["recipe", "calibration"])
def test_a_full_disk_leaves_the_old_recipe_and_calibration(disk: Path, kind: str):
    import kv4

    path, write = disk / kind, kv4.Recipe().to_file if kind == "recipe" else calibration().save
    write(path)
    whole = path.read_bytes()
    with open(disk / "more", "wb", buffering=0) as more, contextlib.suppress(OSError):
        while True:
            more.write(bytes(512))
    with pytest.raises(OSError, match="No space left on device"):
        write(path)
    assert path.read_bytes() == whole and {file.name for file in disk.iterdir()} == {kind, "more"}


def test_a_full_disk_is_one_line_of_the_cache(disk: Path):
    import torch

    import hf_cases
    from kv4.hf import KV4Cache

    model = hf_cases.model_of("qwen3")
    model.set_attn_implementation("kv4")
    cache, small = KV4Cache(model.config), KV4Cache(model.config)
    with torch.no_grad():
        model(input_ids=hf_cases.tokens_of(1, 20), past_key_values=small)
        model(input_ids=hf_cases.tokens_of(1, 2000), past_key_values=cache)
    small.save(disk / "session")
    before = (disk / "session").read_bytes()
    with pytest.raises(OSError, match="No space left on device") as refusal:
        cache.save(disk / "session")
    assert "\n" not in str(refusal.value)
    assert (disk / "session").read_bytes() == before and len(list(disk.iterdir())) == 1
    assert cache.get_seq_length() == 2000


def test_a_folder_that_may_not_be_written_to(disk: Path):
    path = disk / "session"
    with written_whole(path) as file:
        file.write(b"old")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        with pytest.raises(OSError, match="Read-only file system") as refusal, written_whole(path) as file:
            file.write(b"new")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert str(disk) in str(refusal.value) and "\n" not in str(refusal.value)
    assert path.read_bytes() == b"old"


def test_a_file_larger_than_allowed(tmp_path: Path):
    code = """
        import os, resource, signal, sys
        from kv4.whole import written_whole
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        path = sys.argv[1]
        with written_whole(path) as file:
            file.write(b"old")
        try:
            with written_whole(path) as file:
                for _ in range(10):
                    file.write(b"n" * 8192)
        except OSError as refusal:
            print(refusal.strerror)
        print(open(path, "rb").read(), os.listdir(os.path.dirname(path)))
    """
    out, _ = finished(python(code, tmp_path / "session"))
    assert out.splitlines() == ["File too large", "b'old' ['session']"]


# A slow conversion that records that it ran.
CONVERTS = """
    import os, sys, time
    from pathlib import Path
    from kv4.models import convert, store
    cache, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

    def slow(gguf, folder, title, dtype="float32", progress=None):
        with log.open("a") as file:
            file.write(f"begun by {os.getpid()}\\n")
        (folder / "first").write_text("1")
        time.sleep(seconds)
        (folder / "second").write_text("2")

    convert.convert = slow
    def make(scratch):
        (scratch / "model.gguf").write_bytes(b"GGUF")
        return scratch / "model.gguf"

    print("ready", flush=True)
    folder = store._convert_once(cache / "models" / "tiny", "tiny", "0" * 64, "float32", 1, make, lambda *_: None)
    print(folder.name, sorted(p.name for p in folder.iterdir()))
"""
WHOLE = "tiny ['first', 'kv4-source.json', 'second']"


def test_two_programs_convert_a_model_once(tmp_path: Path):
    log = tmp_path / "log"
    both = [python(CONVERTS, tmp_path / "cache", log, 0.5) for _ in range(2)]
    for process in both:
        out, _ = finished(process)
        assert out.splitlines()[-1] == WHOLE
    assert len(log.read_text().splitlines()) == 1


def test_a_program_killed_as_it_converts_leaves_the_model_to_the_next(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("")
    first = python(CONVERTS, tmp_path / "cache", log, 60)
    while not log.read_text():
        assert first.poll() is None, first.stderr.read()
    second = python(CONVERTS, tmp_path / "cache", log, 0)
    assert second.stdout.readline() == "ready\n"
    assert not (tmp_path / "cache" / "models" / "tiny").exists()
    first.kill()
    first.communicate()
    out, _ = finished(second)
    assert out.splitlines()[-1] == WHOLE
    assert len(log.read_text().splitlines()) == 2
