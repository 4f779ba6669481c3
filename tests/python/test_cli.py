"""The `kv4` command: what it prints, what it writes, and how it answers bad input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import tiny_model
from command import kv4, succeeded
from kv4 import Recipe
from kv4.bench.memory import cache_bytes, fp16_bytes, kv4_bytes
from kv4.bench.seal import flops
from kv4.calibration import load
from kv4.cli.demo import first_difference, side_by_side
from kv4.cli.options import numbers
from kv4.cli.output import write_json

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that no command can use."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "latin1.txt").write_bytes(b"\xe9t\xe9")
    (folder / "text.json").write_text("not json")
    (folder / "field.json").write_text(json.dumps({**Recipe().to_dict(), "windows": 64}))
    group = Recipe().to_dict()
    group["value"]["group"] = 128  # of a head dim of 64
    (folder / "group.json").write_text(json.dumps(group))
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (folder / "no-model").mkdir()
    (folder / "a-list").mkdir()
    (folder / "a-list" / "config.json").write_text("[]")
    return folder


NAMED = "kv4, trellis, paper, exact, q8_0, q4_0, int4-token"
BAD_INPUT = [
    (["generate", "no-such-model", "-p", "x"], "model: expected"),
    (["generate", "{bad}/no-model", "-p", "x"], "config.json"),
    (["generate", "{bad}/cut.gguf", "-p", "x"], "cut.gguf"),
    (["generate", "{bad}/none.gguf", "-p", "x"], "none.gguf"),
    (["generate", "{model}", "-p", "x", "-f", "y"], "--prompt, --file: expected one of them; got both"),
    (["generate", "{model}", "-p", ""], "--prompt: expected some text; got an empty one"),
    (["generate", "{model}", "-f", "{bad}/none.txt"], "--file: expected a file"),
    (["generate", "{model}", "-f", "{bad}/empty.txt"], "--file: expected some text"),
    (
        ["generate", "{model}", "-f", "{bad}/latin1.txt"],
        "--file: expected a file of UTF-8 text; got {bad}/latin1.txt, with the byte 0xe9 at 0",
    ),
    (["generate", "{model}", "-f", "{bad}"], "--file: expected a file"),
    (["generate", "{model}", "-f", ""], "--file: expected a file"),
    (["generate", "{model}", "-p", "x", "--recipe", "{bad}/none.json"], "--recipe: expected a file"),
    (["generate", "{model}", "-p", "x", "--recipe", "{bad}/text.json"], "--recipe: "),
    (["generate", "{model}", "-p", "x", "--recipe", "{bad}"], "--recipe: expected a file"),
    (["generate", "{model}", "-p", "x", "--recipe", "{bad}/field.json"], "recipe.windows"),
    (["generate", "{model}", "-p", "x", "--recipe", "{bad}/group.json"], "group"),
    (["generate", "{model}", "-p", "x", "--cache", "fp16", "--recipe", "{bad}/group.json"], "--recipe"),
    (
        ["generate", "{model}", "-p", "x", "--cache", "int3"],
        "--cache: expected one of 'kv4', 'trellis', 'fp16', 'paper', 'exact'; got 'int3'",
    ),
    (
        ["generate", "{model}", "-p", "x", "--max-new-tokens", "0"],
        "--max-new-tokens: expected a number, at least 1; got '0'",
    ),
    (["generate", "{model}", "-p", "x", "--dtype", "int8"], "--dtype: expected one of"),
    (["generate", "{model}", "-p", "x", "--threads", "0"], "--threads: expected a number, at least 1; got '0'"),
    (["generate", "{model}", "-p", "x", "--threads", "abc"], "--threads: expected a whole number; got 'abc'"),
    (["generate", "{model}", "-p", "x", "--threads", ""], "--threads: expected a whole number; got ''"),
    (["generate", "{model}", "-p", "x", "--top-p", "1.5"], "--top-p: expected a number, at most 1"),
    (["generate", "{model}", "-p", "x", "--seed", "x"], "--seed: expected a whole number; got 'x'"),
    (["generate", "{model}", "-p", "x", "--temperature", "hot"], "--temperature: expected a number; got 'hot'"),
    (["generate", "{model}", "-p", "x", "--device", ""], "--device: expected cpu, cuda or cuda:N; got ''"),
    (
        ["generate", "{model}", "-p", "x", "--json", "{bad}"],
        "--json: expected a file that can be written; got {bad}, a folder",
    ),
    (
        ["generate", "{model}", "-p", "x", "--json", ""],
        "--json: expected a file that can be written; got an empty name",
    ),
    (
        ["generate", "{model}", "-p", "x", "--json", "{bad}/empty.txt/a/b"],
        "--json: expected a file that can be written",
    ),
    (["generate", "{model}", "-p", "x", "--jason", "y"], "--jason: expected an option of "),
    (["generate", "{model}", "-p"], "-p: expected a value; got none"),
    (["generate"], "model: expected a value; got none"),
    (["gen"], "kv4: expected a command, one of generate, "),
    (["models", "all"], "kv4 models: expected no further arguments; got all"),
    (["generate", "{bad}/a-list", "-p", "x"], "model folder {bad}/a-list: expected one that transformers can load"),
    (["eval", "{model}", "--state", "{bad}"], "--state: expected a file that can be written; got {bad}, a folder"),
    (["eval", "{model}", "--markdown", "{bad}"], "--markdown: expected a file that can be written"),
    (["eval", "{model}", "--plot", "{bad}"], "--plot: expected a file that can be written"),
    (["eval", "{model}", "--text", "{bad}/latin1.txt"], "--text: expected a file of UTF-8 text"),
    (["bench", "attention", "--plot", "{bad}"], "--plot: expected a file that can be written"),
    (["calibrate", "{model}", "{bad}"], "output: expected a file that can be written; got {bad}, a folder"),
    (["demo", "--out", "{bad}/empty.txt"], "--out: expected a folder that can be written; got {bad}/empty.txt, a file"),
    (["bench", "generate", "--model", "{model}", "--contexts", "64,x"], "--contexts: expected"),
    (["bench", "generate", "--model", "{model}", "--dtypes", "int8"], "--dtypes: expected"),
    (["bench", "attention", "--geometries", "gpt-2"], "--geometries: expected"),
    (["bench", "attention", "--tokens", "0"], "--tokens: expected"),
    (["bench", "attention", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
    (["bench", "generate", "--shape", "gpt-5"], "shape: expected one of llama-3-8b"),
    (["bench", "seal", "--dims", "33"], "--dims: "),
    # The test environment has no vLLM.
    (["bench", "vllm", "--shape", "llama-tiny"], "kv4 bench vllm: expected vLLM in this environment"),
    (["eval", "{model}", "--text", "{bad}/none.txt"], "--text: expected a file"),
    (["eval", "{model}", "--text", "{bad}/short.txt"], "text: expected at least"),
    *(
        ([*command, "{model}", "--recipe", wrong], f"--recipe: expected one of {NAMED}, or a recipe file; got {got}")
        for command in (["eval"], ["eval", "greedy"], ["eval", "needle"])
        for wrong, got in (("q9", "q9"), ("{bad}/none.json", "{bad}/none.json"), ("{bad}", "{bad}"), ("", "''"))
    ),
    *(
        (["calibrate", "{model}", "{bad}/out", "--recipe", wrong], "--recipe: expected one of kv4, trellis, paper, or")
        for wrong in ("q9", "q8_0", "exact")
    ),
    (["eval", "{model}", "--peer", "mlx"], "--peer: expected one of llama, quanto, hqq"),
    (["eval", "{model}", "--length", "2"], "--length: expected a number of at least 4"),
    (["eval", "{model}", "--calibration", "{bad}/none"], "calibration: expected a file"),
    (["eval", "greedy", "{model}", "--context", "1"], "--context: expected a number of at least 4"),
    (["eval", "needle", "{model}", "--lengths", "40"], "lengths: expected at least"),
    (["ablate", "{model}", "--rows", "none"], "--rows: expected all, groups"),
    (
        ["calibrate", "{model}", "{bad}/out", "--bits", "4"],
        "--bits: expected with --method layers only; got --method l",
    ),
    (
        ["calibrate", "{model}", "{bad}/out", "--most-bits", "4"],
        "--most-bits: expected with --method layers only; got --method l",
    ),
    (
        ["calibrate", "{model}", "{bad}/out", "--method", "layers", "--bits", "4,x"],
        "--bits: expected numbers from 1 to 9",
    ),
    (["eval", "{model}", "--bits", "2.2"], "--bits: recipe.bits: expected at least 2.375 at head dim 64; got 2.2"),
    (["generate", "{model}", "-p", "a", "--bits", "4", "--cache", "fp16"], "--bits: expected with --cache kv4"),
    (["generate", "{model}", "-p", "a", "--bits", "12"], "--bits: recipe.bits: expected bits a value, all-in"),
    (["calibrate", "{model}", "{bad}/out", "--method", "best"], "method: expected one of lambda, transform"),
    (["pull", "no-such-model"], "expected one of gemma-3-270m"),
    (["demo", "--model", "no-such-model"], "model: expected"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(map(str, a)) for a, _ in BAD_INPUT])
def test_bad_input_is_answered_in_a_line(
    arguments: list[str], message: str, model: Path, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = kv4(*(argument.format(model=model, bad=bad) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message.format(model=model, bad=bad) in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV4_TRACEBACK", "1")
    assert isinstance(kv4("pull", "no-such-model").exception, ValueError)


@pytest.mark.parametrize(("value", "shows"), [("", False), ("0", False), ("yes", None)])
def test_traceback_is_a_switch(value: str, shows: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV4_TRACEBACK", value)
    result = kv4("pull", "no-such-model")
    assert result.exit_code == 2
    named = "KV4_TRACEBACK: expected 1, 0 or nothing; got yes" in result.stderr
    assert named == (shows is None)
    assert ("expected one of gemma-3-270m" in result.stderr) == (shows is not None)


def test_info_survives_an_instruction_set_that_is_not_here() -> None:
    code = "from kv4.cli import app; app(['info'] + {}, standalone_mode=False)"
    environment = {**os.environ, "KV4_CPU_ISA": "avx1024", "COLUMNS": "200"}

    def run(options: list[str]) -> str:
        command = [sys.executable, "-c", code.format(options)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    line = next(line for line in run([]).splitlines() if "instruction set" in line)
    assert "none  (KV4_CPU_ISA: expected one of " in line and "got avx1024)" in line
    found = json.loads(run(["--json"]))
    assert found["isa"] == "" and found["isa_reason"].endswith("got avx1024") and "portable" in found["isas"]


def test_version() -> None:
    assert succeeded("--version").stdout == f"kv4 {importlib.metadata.version('kv4')}\n"


def test_info() -> None:
    shown = succeeded("info").stdout
    found = json.loads(succeeded("info", "--json").stdout)
    assert found["isa"] in found["isas"]
    assert found["threads"] >= 1
    assert found["torch"] == torch.__version__
    assert found["devices"][0]["name"] == "cpu"
    for value in (found["kv4"], found["isa"], found["transformers"]):
        assert value in shown


def test_models() -> None:
    shown = succeeded("models").stdout
    found = json.loads(succeeded("models", "--json").stdout)
    names = [entry["name"] for entry in found]
    assert names == ["gemma-3-270m", "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]
    assert all(name in shown for name in names)
    assert all(entry["licence"] and entry["download_bytes"] > 0 for entry in found)


def test_generate_prints_text_and_then_its_cost(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "made.json"
    prompt = "The language reference. " * 20
    result = succeeded("generate", model, "-p", prompt, "-n", 12, "--json", data)
    found = json.loads(data.read_text())
    assert found["prompt_tokens"] == 1 + len(prompt)
    assert found["tokens"] == len(found["token_ids"]) == 12
    assert found["cache_tokens"] == found["prompt_tokens"] + 11
    text, cost = result.stdout.rstrip("\n").rsplit("\n", 1)
    assert text == tiny_model.byte_tokenizer().decode(found["token_ids"], skip_special_tokens=True)
    assert f"{found['prompt_tokens']} + 12 tokens" in cost
    assert "ms/token" in cost
    assert f"{found['fp16_bytes'] / found['cache_bytes']:.2f}" in cost


def test_an_exact_cache_generates_the_own_cache_s_tokens(model: Path, tmp_path: Path) -> None:
    made = {}
    for cache in ("fp16", "exact"):
        data = tmp_path / f"{cache}.json"
        succeeded("generate", model, "--cache", cache, "-n", 24, "--json", data, stdin="ab" * 150)
        made[cache] = json.loads(data.read_text())["token_ids"]
    assert made["exact"] == made["fp16"]


def test_generate_takes_a_recipe_file_and_the_paper_s_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    Recipe(window=0, sinks=0).to_file(recipe)
    (tmp_path / "prompt.txt").write_text("a prompt " * 40)
    file = ("-f", tmp_path / "prompt.txt")
    held = {}
    for name, option in {"wide": (), "none": ("--recipe", recipe), "paper": ("--cache", "paper")}.items():
        succeeded("generate", model, *file, "-n", 4, *option, "--json", tmp_path / "made.json")
        held[name] = json.loads((tmp_path / "made.json").read_text())["cache_bytes"]
    assert held["none"] < held["wide"]
    assert held["paper"] < held["wide"]


def test_sampling_follows_its_seed(model: Path, tmp_path: Path) -> None:
    made = []
    for seed in (1, 1, 2):
        options = ("--sample", "--temperature", 1.0, "--seed", seed, "-n", 24)
        succeeded("generate", model, "-p", "abc", *options, "--json", tmp_path / "made.json")
        made.append(json.loads((tmp_path / "made.json").read_text())["token_ids"])
    assert made[0] == made[1] != made[2]


def test_bench_generate(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    options = ("--contexts", "64,300", "--tokens", 4, "--repeats", 2, "--dtypes", "float32")
    result = succeeded("bench", "generate", "--model", model, *options, "--json", data)
    rows = json.loads(data.read_text())["rows"]
    assert [(row["context"], row["cache"]) for row in rows] == [
        (64, "own"), (64, "kv4"), (300, "own"), (300, "kv4"),
    ]  # fmt: skip
    assert all(len(row["repeats_ms"]) == 2 and row["best"] for row in rows)
    # The model's own cache in float32 holds twice fp16's bytes, whatever its windows have dropped.
    assert all(row["cache_bytes"] == 2 * row["fp16_bytes"] for row in rows if row["cache"] == "own")
    assert "kv4/own" in result.stdout
    assert "kv4/exact" not in result.stdout
    result = succeeded("bench", "generate", "--model", model, *options, "--exact", "--json", data)
    rows = json.loads(data.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["own", "kv4", "kv4 exact"] * 2
    # Exact rows take the own cache's room and what the growing buffer has spare.
    assert all(own["cache_bytes"] <= exact["cache_bytes"] for own, _, exact in (rows[:3], rows[3:]))
    assert "kv4/exact" in result.stdout
    prompt = [row["cache_bytes"] for row in rows]
    succeeded("bench", "generate", "--model", model, *options, "--exact", "--random", "--json", data)
    filled = json.loads(data.read_text())
    assert filled["random_fill"]
    # As many tokens, held alike.
    assert [row["cache_bytes"] for row in filled["rows"]] == pytest.approx(prompt, rel=0.1)


def test_bench_attention_says_when_the_machine_was_not_idle() -> None:
    from kv4.bench.attention import ONE_THREAD, Row, disturbed

    def row(tokens: int, candidate: str, seconds: float) -> Row:
        return Row("llama-3-8b", 32, 8, 128, tokens, 1, candidate, seconds, 1, 1.0)

    rows = [row(4096, "kv4 int4", 1.0), row(4096, ONE_THREAD, 1.8), row(8192, "kv4 int4", 2.0)]
    assert disturbed(rows) == []
    assert disturbed([*rows, row(8192, ONE_THREAD, 2.4)]) == ["llama-3-8b, 8,192 tokens"]


def test_bench_attention(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    options = ("--geometries", "qwen2.5-0.5b", "--tokens", "256", "--seconds", 0.001, "--repeats", 1, "--threads", 2)
    result = succeeded("bench", "attention", *options, "--json", data, "--plot", tmp_path / "time.png")
    rows = {row["candidate"]: row for row in json.loads(data.read_text())["rows"]}
    assert set(rows) == {
        "kv4 int4", "kv4 int4, 1 thread", "kv4 exact fp32", "kv4 exact fp16", "sdpa fp32", "sdpa bf16", "sdpa fp16",
    }  # fmt: skip
    assert all(row["roofline"] == pytest.approx(1e9 * row["gb_per_s"] / row["read_bandwidth"]) for row in rows.values())
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    # 4 sinks; the window is at its shortest once all that is due is sealed: two pages of 64 tokens.
    assert rows["kv4 int4"]["bytes_read"] == 2 * (2 * 64 * (64 + 4 + 2) + 128 * 2 * 64 * 2)
    assert rows["sdpa fp16"]["bytes_read"] == 256 * 2 * 2 * 64 * 2
    assert "qwen2.5-0.5b" in result.stdout


class FakeLlama:
    """Stands in for llama_cpp.Llama: a clock that runs 1 ms a token, and a quarter more for each cached one in q4_0."""

    clock = 0.0

    def __init__(self, **options: Any) -> None:
        self.n_tokens, self.slow = 0, options["type_k"] == options["type_v"] == 2
        self.metadata = {
            "general.architecture": "fake", "fake.block_count": "5", "fake.attention.head_count": "8",
            "fake.attention.head_count_kv": "2", "fake.embedding_length": "512",
        }  # fmt: skip
        assert options["flash_attn"]

    def eval(self, tokens: list[int]) -> None:
        FakeLlama.clock += len(tokens) * (1.0 + self.n_tokens * (0.25 if self.slow else 0.125)) * 1e-3
        self.n_tokens += len(tokens)


def test_llama_slope_is_per_token_layer_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from kv4.bench import llama

    module = SimpleNamespace(Llama=FakeLlama, GGML_TYPE_F16=1, GGML_TYPE_Q8_0=8, GGML_TYPE_Q4_0=2)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(llama, "perf_counter", lambda: FakeLlama.clock)
    rows = {row.cache_type: row for row in llama.measure(Path("m.gguf"), [64, 256, 1024], steps=2, repeats=3)}
    # 0.125 ms per cached token over 5 layers of 2 KV heads.
    assert rows["f16"].ns_per_token_head == pytest.approx(12500, rel=1e-3)
    assert rows["q4_0"].ns_per_token_head == pytest.approx(25000, rel=1e-3)
    assert (rows["f16"].layers, rows["f16"].kv_heads, rows["f16"].head_dim) == (5, 2, 64)
    with pytest.raises(ValueError, match="expected two numbers or more; got 1"):
        llama.measure(Path("m.gguf"), [64])


def test_llama_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    result = kv4("bench", "attention", "--llama", "gemma-3-270m")
    assert result.exit_code != 0
    assert "kv4[llama]" in result.output


def test_bench_seal(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    result = succeeded("bench", "seal", "--dims", "64", "--repeats", 1, "--json", data)
    found = json.loads(data.read_text())
    assert [row["what"] for row in found["rows"]] == [
        "kernel",
        "cache, paper's recipe",
        "cache, kv4's recipe",
    ]
    assert all(row["ns_per_vector"] > 0 for row in found["rows"])
    assert "182" in result.stdout
    assert found["flops_per_vector"] in result.stdout.replace("\n", " ")


def test_eval(model: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"quality.{name}" for name in ("json", "md", "png")}
    options = ("--windows", 2, "--length", 256, "--state", tmp_path / "state", "--json", files["json"])
    written = ("--markdown", files["md"], "--plot", files["png"])
    succeeded("eval", model, *options, "--recipe", "exact", "--recipe", "q8_0", *written)
    found = json.loads(files["json"].read_text())
    exact, simulated = found["quality"]["exact"], found["quality"]["q8_0"]
    assert exact["top1"] == 1.0 and exact["windows"] == 2 and exact["tokens"] == 2 * 127
    assert 0 < simulated["kl_median"] <= simulated["kl_p99"] <= simulated["kl_p999"]
    assert found["recipes"]["exact"]["engine"] == "packed" and found["recipes"]["q8_0"]["engine"] == "simulated"
    assert "| exact | 0.0000" in files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "Standard errors over blocks" in files["md"].read_text()
    assert len((tmp_path / "state").read_text().splitlines()) == 4


def test_calibrate_then_eval(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "lambda.safetensors"
    succeeded("calibrate", model, file, "--windows", 1, "--length", 512)
    data = tmp_path / "quality.json"
    succeeded("eval", model, "--calibration", file, "--windows", 1, "--length", 512, "--fresh", "--json", data)
    quality = json.loads(data.read_text())["quality"][file.name]
    assert quality["kl"] > 0 and quality["cache_bytes"] > 0


def test_widths_of_layers_from_the_command_line(model: Path, tmp_path: Path) -> None:
    layers, peer = tmp_path / "layers.safetensors", tmp_path / "oscar.safetensors"
    size = ("--windows", 1, "--length", 512)
    succeeded("calibrate", model, layers, *size, "--first", 1, "--method", "layers", "--bits", "2.5,4.25")
    succeeded("calibrate", model, peer, *size, "--first", 1, "--method", "oscar")
    few = tmp_path / "few.safetensors"
    budgets = ("--bits", "4.25,8.5", "--most-bits", 4)  # the second has room for more
    succeeded("calibrate", model, few, *size, "--first", 1, "--method", "layers", *budgets)
    assert {width for pair in load(few).widths_of(8.5) for width in pair} == {4}
    data, plot = tmp_path / "bits.json", tmp_path / "bits.png"
    options = ("--calibration", layers, "--calibration", peer, "--bits", "2.5,4.25", "--fresh")
    succeeded("eval", model, *size, *options, "--json", data, "--plot", plot)
    quality = json.loads(data.read_text())["quality"]
    assert {"layers 2.5", "layers 4.25", "kv4", "q8_0", "int4-token", "paper", "OSCAR's recipe"} <= set(quality)
    assert quality["layers 2.5"]["kl"] > quality["layers 4.25"]["kl"] > 0
    assert quality["layers 4.25"]["cache_bytes"] > quality["layers 2.5"]["cache_bytes"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    said = succeeded("generate", model, "-p", "def f():", "-n", 8, "--calibration", layers, "--bits", 2.5)
    assert "8 tokens" in said.stdout
    table = tmp_path / "predicted.md"
    rows = ("--rows", "kv4,layers-4.25", "--predict", "--markdown", table)
    succeeded("ablate", model, *size, *rows, "--state", tmp_path / "state")
    assert "| widths of layers, 4.25 bits | 4." in table.read_text()


def test_ablate(model: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"ablate.{name}" for name in ("json", "md", "png")}
    options = ("--windows", 1, "--length", 512, "--state", tmp_path / "state", "--rows", "kv4,mean,lambda-calibrated")
    succeeded("ablate", model, *options, "--json", files["json"], "--markdown", files["md"], "--plot", files["png"])
    rows = {row["name"]: row for row in json.loads(files["json"].read_text())["rows"]}
    assert list(rows) == ["kv4", "mean-off", "lambda-calibrated"]
    assert all(row["quality"]["kl"] > 0 and row["errors"]["score"] > 0 for row in rows.values())
    assert rows["kv4"]["bits_per_value"] - rows["mean-off"]["bits_per_value"] == 16 / 64 / 2
    assert "| no page mean | 4.250 |" in files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    listed = succeeded("ablate", model, "--list").stdout
    assert "rot-learned-srft" in listed and "k4v3" in listed


def test_eval_needle_greedy_and_energy(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "needle.png"
    data = tmp_path / "needle.json"
    options = ("--lengths", "256,320", "--depths", 2, "--fresh", "--plot", plot, "--json", data)
    succeeded("eval", "needle", model, *options)
    cells = json.loads(data.read_text())["cells"]
    assert {cell["cache"] for cell in cells} == {"fp16", "kv4", "paper"} and len(cells) == 12
    assert all(0 < cell["probability"] < 1 for cell in cells)
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = ("--recipe", "exact", "--recipe", "q8_0", "--recipe", "int4-token", "--bits", "3.5", "--refined", 1)
    succeeded("eval", "greedy", model, "--context", 200, "--tokens", 80, "--prompts", 2, *names, "--json", data)
    caches = json.loads(data.read_text())["caches"]
    of = {name: [g for g in caches if g["cache"] == name] for name in dict.fromkeys(g["cache"] for g in caches)}
    assert list(of) == ["fp16", "exact", "q8_0", "int4-token", "kv4, 1 refined", "kv4 3.5"]
    assert all([g["prompt"] for g in rows] == [0, 1] for rows in of.values())
    assert all((g["first_difference"] == 80) == (g["forced"] == 1) for g in caches)
    assert sum(g["forced"] for g in of["exact"]) >= sum(g["forced"] for g in of["int4-token"])
    succeeded("eval", "energy", model, "--length", 256, "--plot", plot, "--json", data)
    layers = next(iter(json.loads(data.read_text())["models"].values()))
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert all(0 <= row["mean"] <= row["page_mean"] <= 1 and row["kv4"] > 0 for row in layers)


def test_demo_leaves_a_plot_and_its_data(model: Path, tmp_path: Path) -> None:
    result = succeeded("demo", "--model", model, "--contexts", "256", "--tokens", 8, "--repeats", 1, "--out", tmp_path)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert all(len(row["generated"]) == 8 for row in rows)
    assert min(row["context"] for row in rows if row["context"] > 256) > 1000
    for words in ("tokens side by side", "first divergence", "ms/token", "fp16/kv4"):
        assert words in result.stdout


def test_fp16_bytes_are_what_a_half_precision_cache_holds(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    for tokens in (5, 127, 128, 300):
        cache = DynamicCache(config=loaded.config)
        with torch.inference_mode():
            loaded(input_ids=torch.ones(2, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert fp16_bytes(loaded.config, tokens, batch=2) == cache_bytes(cache)


def test_helpers(tmp_path: Path) -> None:
    assert numbers("4k, 256,256", "--tokens") == [256, 4096]
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2]) is None
    assert flops(128) == 2.5 * 128 * 7 + 5 * 128
    write_json({"a": float("nan"), "b": (1.5, float("inf"))}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, None]}


def test_bench_generate_of_a_shape_and_a_batch(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    options = ("--contexts", "64", "--tokens", 2, "--repeats", 1, "--dtypes", "float32", "--batch", 3, "--random")
    result = succeeded("bench", "generate", "--shape", "llama-tiny", *options, "--json", data)
    found = json.loads(data.read_text())
    assert (found["model"], found["device"], found["batch"]) == ("llama-tiny (random weights)", "cpu", 3)
    own = next(row for row in found["rows"] if row["cache"] == "own")
    # 64 tokens, 2 to warm up and 2 timed: 2 layers of one KV head of 64 channels, on two sides, in float32.
    assert own["cache_bytes"] == 2 * own["fp16_bytes"] == 3 * 68 * 2 * 2 * 64 * 4
    assert "batch 3" in result.stdout


def test_bench_generate_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for which memory runs out stands without figures, and the others are measured on."""
    import torch

    from kv4.bench import generate, shapes

    real = generate.new_cache

    def scarce(model: Any, cache: str, recipe: Any = None) -> Any:
        made = real(model, cache, recipe)
        if cache == generate.OWN:
            monkeypatch.setattr(made, "update", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        return made

    monkeypatch.setattr(generate, "new_cache", scarce)
    model = shapes.random_model("llama-tiny", torch.float32, torch.device("cpu"))
    ids = torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))
    rows = generate.run({"float32": model}, ids, [64, 90], tokens=2, repeats=1, random_fill=True)
    assert [(row.context, row.cache, row.fits, len(row.repeats_ms)) for row in rows] == [
        (64, "own", False, 0), (64, "kv4", True, 1), (90, "kv4", True, 1),
    ]  # fmt: skip
    pairs = generate.best_rows(rows)
    assert [(own.fits, own.batch, kv4.fits) for own, kv4 in pairs] == [(False, 1, True)] * 2


@pytest.mark.parametrize("text", ["16", "16x", "x32k", "16x32kx2", "0x4k"])
def test_cases_of_the_cuda_benchmark(text: str) -> None:
    from kv4.cli.bench_cuda import cases_of

    assert cases_of("16x32k,1x4096") == [(16, 32768), (1, 4096)]
    with pytest.raises(ValueError, match="--cases: expected"):
        cases_of(text)


def test_no_token_of_the_demo_wraps_in_80_columns() -> None:
    from rich.console import Console

    own = [" word" * (1 + i % 3) for i in range(40)] + ["a-token-of-forty-five-characters-and-then-some!"]
    kv4_ = [" w\u6f22\u5b57" if i == 7 else word for i, word in enumerate(own)]
    for width in (80, 120, 200):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        made = side_by_side([own, kv4_], width)
        console.print(made)
        lines = console.export_text().splitlines()
        rows = [line for line in lines if line.strip()[:1].isdigit()]
        assert len(rows) == made.row_count and max(map(len, lines)) <= width
        # Only the token that no cell of 80 columns has room for is cut, on both sides.
        assert sum(line.count("\u2026") for line in rows) == (2 if width == 80 else 0)


def test_bytes_of_a_longer_cache_are_those_that_it_holds(model: Path) -> None:
    from kv4.hf import KV4Cache

    config = AutoModelForCausalLM.from_pretrained(model).config
    cache = KV4Cache(config)
    rows = torch.randn(1, 2, 1000, 64)
    for tokens in (1000, 2000, 3000):
        for layer in cache.layers:
            layer.update(rows, rows)
        cache.seal()
        assert kv4_bytes(config, None, tokens, torch.float32) == pytest.approx(cache.nbytes(), rel=0.1)
