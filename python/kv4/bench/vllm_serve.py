"""`vllm serve` under a load of chats, with kv4's cache and with vLLM's own ones: a server at a time, requests by vLLM's
own `vllm bench serve`.

Chats are made on the spot, prompts and answers of very uneven lengths as in collections of real ones: log-normal,
prompts of 10 to 8,192 words with a median of 300, answers of 8 to 1,024 tokens with one of 150. Words are of Python's
language reference; the tokenizer of a shape knows each of them as a token.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kv4.bench.text import python_reference
from kv4.bench.vllm import KINDS, reason, shape_folder

# Time limits in seconds: until a server answers, until it has exited.
_START, _STOP = 600, 60
# `vllm bench serve`: the command is missing from the package for CPUs, whose name differs.
_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass
class Load:
    requests: int
    rate: float | None = None  # requests per second, Poisson arrivals; None: all at once
    longest: int = 8192  # words of a prompt at most
    seed: int = 0


@dataclass
class Served:
    kind: str
    completed: int = 0
    failed: int = 0
    requests_a_second: float = 0.0
    tokens_a_second: float = 0.0  # of answers
    first_token_ms: float = 0.0  # median
    token_ms: float = 0.0  # between tokens of an answer, median of the answers' means
    slow_token_ms: float = 0.0  # between two tokens, 99th percentile
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lengths(load: Load) -> list[tuple[int, int]]:
    """Words of each prompt, tokens of its answer."""
    drawn = np.random.default_rng(load.seed)
    prompts = np.exp(drawn.normal(np.log(300), 1.2, load.requests)).clip(10, load.longest)
    answers = np.exp(drawn.normal(np.log(150), 0.9, load.requests)).clip(8, 1024)
    return [(int(p), int(a)) for p, a in zip(prompts, answers, strict=True)]


def write_chats(file: Path, load: Load) -> None:
    """JSON lines, as `vllm bench serve --dataset-name custom` reads them."""
    words = python_reference().split()
    drawn = np.random.default_rng(load.seed + 1)
    with file.open("w") as out:
        for count, answer in lengths(load):
            first = int(drawn.integers(0, len(words) - count))
            out.write(json.dumps({"prompt": " ".join(words[first : first + count]), "output_tokens": answer}) + "\n")


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of words for a model without one: those of Python's language reference, as far as `size` goes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    words = dict.fromkeys([*special, *python_reference().split()])
    model = models.WordLevel({word: i for i, word in enumerate(words) if i < size}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def flags(settings: dict[str, Any]) -> list[str]:
    """Arguments of LLM as options of `vllm serve`."""
    given = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            given.append(option)
        elif value is not False and value is not None:
            given += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return given


@contextlib.contextmanager
def server(
    folder: str, kind: str, settings: dict[str, Any], log: Path, *options: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of one that answers, and its process, which leads a group of its own. Errors: RuntimeError with the
    last error of its log, which is added to, if it never does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", *options, *flags({**KINDS[kind], **settings})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("a") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        # The engine runs in a child process of the same session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + _START
    while True:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(reason(log.read_text()))
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def ask(address: str, folder: str, chats: Path, load: Load) -> dict[str, Any]:
    """What `vllm bench serve` found. Errors: RuntimeError with its last line."""
    result = chats.with_suffix(".result.json")
    rate = "inf" if load.rate is None else str(load.rate)
    options = "--backend openai --endpoint /v1/completions --dataset-name custom --custom-output-len -1 --ignore-eos"
    options += f" --skip-chat-template --disable-shuffle --num-prompts {load.requests} --request-rate {rate}"
    options += f" --num-warmups {min(8, load.requests)} --seed {load.seed} --temperature 0 --save-result --disable-tqdm"
    given = [*options.split(), "--base-url", address, "--model", folder, "--dataset-path", str(chats)]
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, *given, "--result-filename", str(result)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0 or not result.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason said"]
        raise RuntimeError(f"vllm bench serve: {lines[-1].strip()[-300:]}")
    return json.loads(result.read_text())


def measure(
    model: str | None,
    shape: str | None,
    kinds: list[str],
    load: Load,
    settings: dict[str, Any],
    progress: Callable[[str], None] = lambda what: None,
    layers: int | None = None,
) -> list[Served]:
    """model: a folder; or shape: random weights of it, of so many layers. A kind that does not start is a row with the
    reason."""
    rows: list[Served] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if shape is None:
            folder = str(model)
        else:
            made = shape_folder(shape, root, layers)
            write_tokenizer(made, json.loads((made / "config.json").read_text())["vocab_size"])
            folder, settings = str(made), {"load_format": "dummy", **settings}
        chats = root / "chats.jsonl"
        write_chats(chats, load)
        for kind in kinds:
            try:
                with server(folder, kind, settings, root / f"{kind}.log", "--no-enable-prefix-caching") as (address, _):
                    found = ask(address, folder, chats, load)
                rows.append(
                    Served(
                        kind,
                        found["completed"],
                        found["failed"],
                        found["request_throughput"],
                        found["output_throughput"],
                        found["median_ttft_ms"],
                        found["median_tpot_ms"],
                        found["p99_itl_ms"],
                    )
                )
            except RuntimeError as error:
                rows.append(Served(kind, refused=str(error)))
            progress(kind)
    return rows
