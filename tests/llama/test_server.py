"""llama-server on kv4's cache: slots in parallel, saved and restored."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import CPU, EXACT, PACKED, environment


class Server:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: dict[str, object] | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def complete(self, prompt: str, slot: int, tokens: int = 16) -> str:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "id_slot": slot, "cache_prompt": True}
        return self.ask("/completion", body)["content"]


@contextmanager
def serving(programs: Path, file: Path, folder: Path, more: Mapping[str, str], *arguments: str) -> Iterator[Server]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        programs / "llama-server",
        "-m",
        file,
        "-c",
        "4096",
        "-np",
        "2",
        "-t",
        "2",
        "-fa",
        "on",
        "--port",
        str(port),
        "--no-warmup",
    ]
    command += ["--slot-save-path", f"{folder}/", *arguments]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([str(c) for c in command], env=environment(more), stdout=log, stderr=log)
    server = Server(port)
    try:
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                server.ask("/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        yield server
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
    finally:
        process.terminate()
        process.wait(60)


def story(server: Server, text: str) -> list[str]:
    """One request after another: on, in the other slot, back, saved, and restored into the other slot."""
    first = server.complete(text[:2400], 0)
    replies = [
        first,
        server.complete(text[:2400] + first + " Then", 0),
        server.complete(text[300:900], 1),
        server.complete(text[:1500], 0),
    ]
    server.ask("/slots/0?action=save", {"filename": "slot"})
    replies.append(server.complete(text[:1500] + " And", 0))
    server.ask("/slots/1?action=restore", {"filename": "slot"})
    replies.append(server.complete(text[:1500] + " And", 1))
    return replies


@pytest.mark.parametrize("cells", ["-kvu", "-no-kvu"])
def test_slots_say_what_they_say_on_llama_cpps_own_cache(
    programs: Path, text: Path, model: Callable[[str], Path], tmp_path: Path, cells: str
) -> None:
    prose, replies = text.read_text(), {}
    for name, more in (("own", CPU), ("exact", EXACT)):
        (tmp_path / name).mkdir()
        with serving(programs, model("gemma-3-270m"), tmp_path / name, more, cells) as server:
            replies[name] = story(server, prose)
    assert replies["exact"] == replies["own"]


@pytest.mark.parametrize("cells", ["-kvu", "-no-kvu"])
def test_packed_slots_answer_in_parallel(
    programs: Path, text: Path, model: Callable[[str], Path], tmp_path: Path, cells: str
) -> None:
    prose = text.read_text()
    with serving(programs, model("gemma-3-270m"), tmp_path, PACKED, cells) as server:
        with ThreadPoolExecutor(2) as pool:
            replies = list(
                pool.map(lambda slot: server.complete(prose[600 * slot : 600 * slot + 2000], slot, 80), (0, 1))
            )
        assert all(len(r) > 20 for r in replies)
        assert len(story(server, prose)) == 6
    assert "kv4: " in (tmp_path / "log").read_text()
