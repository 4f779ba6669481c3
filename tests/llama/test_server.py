"""llama-server on kv4's cache: chats in parallel, cancelled, saved, killed and restored, shifted and drafted for."""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import TINY, VOCABULARY

from conftest import CPU, EXACT, PACKED, Model, environment, held, said


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def ask(self, path: str, body: dict[str, object] | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return json.load(answer)

    def complete(self, prompt: str | list[int], tokens: int = 16, **more: object) -> dict:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": True, "return_tokens": True}
        return self.ask("/completion", {**body, **more})

    def cancel(self, prompt: list[int]) -> None:
        """Asks for a long answer, and hangs up as it begins."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        connection.request("POST", "/completion", json.dumps({"prompt": prompt, "n_predict": 400, "stream": True}))
        connection.getresponse().read(1)
        connection.close()

    def resident(self) -> int:
        """Bytes of memory of its own that the process has."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("expected RssAnon")


@contextmanager
def serving(programs: Path, file: Path, folder: Path, more: Mapping[str, str], *arguments: str) -> Iterator[Server]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder.mkdir(exist_ok=True)
    command = [programs / "llama-server", "-m", file, "-t", "1", "-fa", "on", "--port", str(port), "--no-warmup"]
    command += ["--slot-save-path", f"{folder}/", *arguments]
    with open(folder / "log", "a") as log:
        process = subprocess.Popen([str(c) for c in command], env=environment(more), stdout=log, stderr=log)
    server = Server(process, port, folder / "log")
    try:
        for _ in range(960):
            assert process.poll() is None, server.log.read_text()[-2000:]
            try:
                server.ask("/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.0625)
        yield server
    finally:
        alive = process.poll() is None
        process.terminate()
        process.wait(60)
    assert alive, server.log.read_text()[-2000:]


def story(server: Server, text: str) -> list[str]:
    """One request after another: on, in the other slot, back, saved, and restored into the other slot."""
    replies: list[str] = []

    def ask(prompt: str, slot: int) -> None:
        replies.append(server.complete(prompt, id_slot=slot, ignore_eos=True)["content"])

    ask(text[:1000], 0)
    ask(text[:1000] + replies[0] + " Then", 0)
    ask(text[300:700], 1)
    ask(text[:800], 0)
    server.ask("/slots/0?action=save", {"filename": "slot"})
    ask(text[:800] + " And", 0)
    server.ask("/slots/1?action=restore", {"filename": "slot"})
    ask(text[:800] + " And", 1)
    return replies


@pytest.mark.parametrize(("name", "cells"), [("gemma-3-270m", "-kvu"), ("llama", "-no-kvu")])
def test_slots_say_what_they_say_on_llama_cpps_own_cache(
    programs: Path, text: Path, model: Model, tmp_path: Path, name: str, cells: str
) -> None:
    prose, replies = text.read_text(), {}
    for cache, more in (("own", CPU), ("exact", EXACT), ("packed", PACKED)):
        with serving(programs, model(name), tmp_path / cache, more, "-c", "4096", "-np", "2", cells) as server:
            replies[cache] = story(server, prose)
    assert replies["exact"] == replies["own"]
    assert all(replies["packed"]) and len(replies["packed"]) == 6
    log = (tmp_path / "packed/log").read_text()
    assert said(log) == [] and held(log, "at the end")[1] > 0


def chat(server: Server, number: int) -> list[dict[int, float]]:
    """Three random turns, each of which takes the answer before it back and says something else; now and then one is
    cancelled and asked for again. The likeliest first tokens of each answer, with their log-probabilities."""
    chance = random.Random(number)
    prompt, answers = [1], []
    for turn in range(3):
        prompt += [chance.randrange(5, VOCABULARY) for _ in range(chance.randrange(20, 160))]
        if number % 5 == turn:
            server.cancel(prompt)
        tokens = chance.randrange(4, 24)
        answer = server.complete(prompt, tokens, n_probs=40, ignore_eos=True)
        assert len(answer["tokens"]) == tokens
        answers.append({x["id"]: x["logprob"] for x in answer["completion_probabilities"][0]["top_logprobs"]})
    return answers


Chats = list[list[dict[int, float]]]


def apart(a: Chats, b: Chats) -> float:
    """Root mean square of what the log-probabilities of the same tokens differ by."""
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    errors = [x[token] - y[token] for x, y in pairs for token in x.keys() & y.keys()]
    assert len(errors) > 150 * 20
    return math.sqrt(math.fsum(e * e for e in errors) / len(errors))


@pytest.mark.parametrize("cells", ["-kvu", "-no-kvu"])
def test_fifty_chats_in_four_slots_are_answered_as_on_llama_cpps_own_cache(
    programs: Path, model: Model, tmp_path: Path, cells: str
) -> None:
    """Which requests share a batch is chance, and with it the order of sums: llama.cpp's own answers differ from run to
    run by what float16 rounds in each layer. Packed, by what four bits leave of keys and values."""
    answers: dict[str, Chats] = {}
    for name, more in (("own", CPU), ("exact", EXACT), ("packed", PACKED)):
        with (
            serving(programs, model("llama"), tmp_path / name, more, "-c", "4096", "-np", "4", cells) as server,
            ThreadPoolExecutor(6) as pool,
        ):
            answers[name] = list(pool.map(lambda number, at=server: chat(at, number), range(50)))
    layers = TINY["llama"].layers
    assert apart(answers["exact"], answers["own"]) < layers * 8 * 2**-11
    assert layers * 8 * 2**-11 < apart(answers["packed"], answers["own"]) < math.sqrt(0.0095 * 2 * layers)
    log = (tmp_path / "packed/log").read_text()
    assert said(log) == [] and held(log, "at the end")[1] > 0


def test_a_killed_server_goes_on_from_saved_slots(programs: Path, model: Model, tmp_path: Path) -> None:
    chance = random.Random(1)
    prompt = [1] + [chance.randrange(5, VOCABULARY) for _ in range(700)]
    after = {}
    for name, more in (("own", CPU), ("exact", EXACT), ("packed", PACKED)):
        arguments = (programs, model("llama"), tmp_path / name, more, "-c", "4096", "-np", "2")
        with pytest.raises(AssertionError), serving(*arguments) as server:
            first = server.complete(prompt, 40, id_slot=0)["tokens"]
            server.ask("/slots/0?action=save", {"filename": "slot"})
            server.process.kill()
            server.process.wait()
        with serving(*arguments) as server:
            server.ask("/slots/1?action=restore", {"filename": "slot"})
            answer = server.complete(prompt + first + [7], 40, id_slot=1)
            assert answer["timings"]["cache_n"] >= len(prompt + first) - 1
            after[name] = (first, answer["tokens"])
    assert after["exact"] == after["own"]
    assert len(after["packed"][1]) == 40


def test_a_file_that_is_no_slot_is_refused_and_the_server_goes_on(programs: Path, model: Model, tmp_path: Path) -> None:
    with serving(programs, model("llama"), tmp_path, PACKED, "-c", "2048", "-np", "1") as server:
        first = server.complete([1, 70, 80, 90] * 60, 8)["tokens"]
        (tmp_path / "letter").write_text("Dear Sir or Madam, " * 20)
        with pytest.raises(urllib.error.HTTPError):
            server.ask("/slots/0?action=restore", {"filename": "letter"})
        assert server.complete([1, 70, 80, 90] * 60, 8)["tokens"] == first


@pytest.mark.parametrize(
    "arguments",
    [
        ("--context-shift",),
        ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "8"),
        ("--spec-type", "draft-simple", "--spec-draft-n-max", "6", "-md", "llama"),
    ],
    ids=["shifted", "n-gram", "draft model"],
)
def test_long_answers_are_those_of_llama_cpps_own_cache(
    programs: Path, model: Model, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Longer than the context, which is shifted; and with drafts, most of which are taken back."""
    given = [str(model(a)) if a == "llama" else a for a in arguments]
    chance = random.Random(2)
    prompt = [1] + [chance.randrange(5, VOCABULARY) for _ in range(300)]
    shifted = "--context-shift" in arguments
    answers = {}
    for name, more in (("own", CPU), ("exact", EXACT), ("packed", PACKED)):
        size = "512" if shifted else "2048"
        with serving(programs, model("llama"), tmp_path / name, more, "-c", size, "-np", "1", *given) as server:
            answers[name] = server.complete(prompt, 700, ignore_eos=True, n_keep=8)
    assert answers["exact"]["tokens"] == answers["own"]["tokens"]
    assert len(answers["packed"]["tokens"]) == len(answers["own"]["tokens"]) == 700
    if shifted:
        assert answers["packed"]["truncated"]
    else:
        assert all(a["timings"]["draft_n"] > 20 for a in answers.values())
    log = (tmp_path / "packed/log").read_text()
    assert said(log) == [] and held(log, "at the end")[1] > 0


def test_a_slot_of_16384_tokens_takes_less_than_a_third_of_f16s_memory(
    programs: Path, model: Model, tmp_path: Path
) -> None:
    """A page of heads of 128 has 4.31 bits a value, and 64 to 127 tokens are exact: 3.6 times less than f16. What a
    server takes beside the cache it takes with its own cache too, which is there from the beginning."""
    arguments = ("-c", "16640", "-np", "1", "-cram", "0", "--ctx-checkpoints", "0")
    chance = random.Random(3)
    prompt = [1] + [chance.randrange(5, VOCABULARY) for _ in range(16383)]
    grown = {}
    for name, more in (("own", CPU), ("packed", PACKED)):
        with serving(programs, model("wide"), tmp_path / name, more, *arguments) as server:
            server.complete(prompt[:1024], 4)
            before = server.resident()
            server.complete(prompt, 4)
            grown[name] = server.resident() - before
    f16 = (16384 - 1024) * 2 * 4 * 128 * 2 * 2  # layers, heads, channels, sides, bytes
    taken = grown["packed"] - grown["own"]
    assert f16 / 5 < taken < f16 / 3.4, (grown, f16)
