"""`vllm serve` with kv4: many chats at once, streams, a server that is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kv4.bench import vllm_serve

CHATS = int(os.environ.get("KV4_VLLM_CHATS", "24"))
TOKENS = 12
# A base model has no template of its own.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SUBJECTS = ["rivers", "prime numbers", "bread", "the moon", "chess", "copper", "bees", "glaciers"]


@contextmanager
def server(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "max_num_seqs": 64, "enforce_eager": True}
    settings |= {"chat_template": template, "served_model_name": "m"}
    with vllm_serve.server(str(model), "kv4", settings, folder / "server.log") as running:
        yield running


def question(i: int) -> str:
    """Of 1 to some 200 tokens, some beginning alike."""
    return f"Tell me about {SUBJECTS[i % 8]}, and number {i // 8}. " + "Please be exact. " * (i % 5 * 10)


def ask(address: str, i: int) -> str:
    """Odd ones as a stream, which must be the whole answer too."""
    body = {"model": "m", "messages": [{"role": "user", "content": question(i)}], "temperature": 0}
    body |= {"max_tokens": TOKENS, "ignore_eos": True, "stream": bool(i % 2)}
    asked = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=550) as answer:
        if not body["stream"]:
            return json.load(answer)["choices"][0]["message"]["content"]
        lines = [line.decode().strip() for line in answer]
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parts = [choice["delta"].get("content") or "" for e in events[:-1] for choice in json.loads(e)["choices"]]
    assert len(parts) > 1
    return "".join(parts)


def usage(address: str) -> float:
    """Part of the blocks that requests hold."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        found = [x for x in answer.read().decode().splitlines() if x.startswith("vllm:kv_cache_usage_perc")]
    return float(found[0].split()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


def test_chats_at_once_get_answers_and_a_killed_server_gives_the_same_after(model: Path, folder: Path) -> None:
    with server(model, folder) as (address, process):
        with ThreadPoolExecutor(CHATS) as pool:
            together = list(pool.map(lambda i: ask(address, i), range(CHATS)))
        assert all(together)
        assert usage(address) == 0
        # Answers of one question do not depend on who else asks, but for near-ties: float sums of other batches.
        again = [ask(address, i) for i in range(8)]
        assert sum(a == b for a, b in zip(again, together, strict=False)) >= 6, list(zip(again, together, strict=False))
        with ThreadPoolExecutor(8) as pool:
            lost = [pool.submit(ask, address, i) for i in range(8)]
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        # What was under way ends with an error, not with half an answer.
        failed: list[Any] = [x.exception() for x in lost]
        assert any(failed)
        assert all(error is not None or x.result() in together[:8] for x, error in zip(lost, failed, strict=True))
    with server(model, folder) as (address, _):
        after = [ask(address, i) for i in range(8)]
        assert sum(a == b for a, b in zip(after, again, strict=True)) >= 7, list(zip(after, again, strict=True))
        assert usage(address) == 0
