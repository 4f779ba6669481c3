"""A loaded machine: the neighbours that the benchmark starts, and how the command has its threads wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kv4
from kv4.bench import generate, shapes
from kv4.bench.neighbours import neighbours
from kv4.cli import app, openmp

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether they end; what ends them needs a moment to reach them."""
    until = monotonic() + 60
    while any(alive(pid) for pid in pids) and monotonic() < until:
        sleep(0.01)
    return not any(alive(pid) for pid in pids)


@linux
def test_neighbours_are_there_while_the_block_runs_and_gone_after_it() -> None:
    with neighbours(3) as pids:
        assert len(set(pids)) == 3 and all(alive(pid) for pid in pids)
        cpus = sorted(os.sched_getaffinity(0))
        assert [os.sched_getaffinity(pid) for pid in pids] == [{cpus[i % len(cpus)]} for i in range(3)]
    assert not any(alive(pid) for pid in pids)
    with neighbours(1, pin=False) as pids:
        assert os.sched_getaffinity(pids[0]) == os.sched_getaffinity(0)
    with pytest.raises(KeyError), neighbours(2) as pids:
        raise KeyError("what was measured failed")
    assert not any(alive(pid) for pid in pids)
    with neighbours(0) as pids:
        assert pids == []
    with pytest.raises(ValueError, match="count: expected at least 0; got -1"), neighbours(-1):
        pass


@contextmanager
def measuring() -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A process of its own session with two neighbours: (it, theirs)."""
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from kv4.bench.neighbours import neighbours\n"
        "with neighbours(2) as pids:\n"
        "    print(*pids, flush=True)\n"
        "    __import__('time').sleep(600)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


@linux
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_neighbours_end_with_a_parent_that_a_signal_ends(by: signal.Signals) -> None:
    with measuring() as (process, pids):
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        os.kill(process.pid, by)
        process.wait()
        assert gone(pids)


@linux
def test_an_interrupt_from_the_terminal_is_the_parents_alone() -> None:
    """A terminal's Ctrl-C reaches the whole group: the neighbours say nothing and end with their parent."""
    with measuring() as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
        assert said.count("KeyboardInterrupt") == 1
        assert gone(pids)


@linux
def test_neighbours_end_where_the_benchmark_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    real = generate.beside

    @contextmanager
    def watched(count: int, *, pin: bool) -> Iterator[list[int]]:
        with real(count, pin=pin) as pids:
            started.extend(pids)
            if count:
                assert all(alive(pid) for pid in pids)
                raise RuntimeError("failed beside neighbours")
            yield pids

    monkeypatch.setattr(generate, "beside", watched)
    model = shapes.random_model("llama-tiny", torch.float32, torch.device("cpu"))
    ids = torch.randint(256, (1, 70), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="failed beside"):
        generate.run({"float32": model}, ids, [64], tokens=1, repeats=1, random_fill=True, neighbours=2)
    assert len(started) == 2 and not any(alive(pid) for pid in started)


def bench(*options: object) -> Any:
    arguments = ["bench", "generate", "--shape", "llama-tiny", "--contexts", "64", "--tokens", 2, "--repeats", 3]
    arguments += ["--dtypes", "float32", "--random", *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_bench_generate_beside_neighbours_shows_both_in_one_run(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    result = bench("--neighbours", 1, "--no-pin", "--json", data)
    assert result.exit_code == 0, result.output
    found = json.loads(data.read_text())
    assert found["neighbours"] == 1 and found["pinned"] is False and set(found["openmp"]) == set(openmp.VARIABLES)
    assert [row["cache"] for row in found["rows"]] == ["own", "kv4"]
    for row in found["rows"]:
        assert len(row["repeats_ms"]) == len(row["loaded_ms"]) == 3
        assert row["loaded_ms_per_token"] == sorted(row["loaded_ms"])[1]
        assert row["slowdown"] == row["loaded_ms_per_token"] / row["ms_per_token"]
    assert "beside 1 busy process;" in " ".join(result.stdout.split())  # lines break where the console ends
    assert all(f"{row['loaded_ms_per_token']:.2f}" in result.stdout for row in found["rows"])
    result = bench("--json", data)
    found = json.loads(data.read_text())
    assert found["neighbours"] == 0 and all(row["loaded_ms"] == [] for row in found["rows"])
    assert "busy" not in result.stdout


def test_a_negative_number_of_neighbours_is_refused() -> None:
    result = bench("--neighbours", -1)
    assert result.exit_code == 2 and "--neighbours" in result.output
    with pytest.raises(ValueError, match="neighbours: expected at least 0; got -1"):
        generate.run({}, torch.zeros(1, 64, dtype=torch.long), [64], neighbours=-1)


SETTINGS = [
    ({}, "10000"),
    ({"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}, "10000"),
    ({"GOMP_SPINCOUNT": "77"}, "77"),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
]


@pytest.mark.parametrize(("given", "spins"), SETTINGS, ids=["none", "empty", "spins", "policy"])
def test_the_command_bounds_the_spin_before_the_runtime_reads_it(given: dict[str, str], spins: str) -> None:
    """The runtime itself says what it has read."""
    environment = {name: value for name, value in os.environ.items() if name not in openmp.VARIABLES}
    environment |= given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-c", "from kv4.cli import main; main()", "info", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = {line.split("=")[1].strip(" '") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    if not said:
        pytest.skip("torch's threads are not GNU OpenMP's here")
    assert said == {spins}
    assert json.loads(done.stdout)["openmp"]["OMP_WAIT_POLICY"] == given.get("OMP_WAIT_POLICY")


def test_what_the_user_has_set_stays() -> None:
    for given, _ in SETTINGS[2:]:
        environment = dict(given)
        openmp.bound_spin(environment)
        assert environment == given


def test_the_command_comes_before_torch_and_the_compiled_module() -> None:
    code = "import sys, kv4, kv4.cli; print([name for name in ('torch', 'kv4._core') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_package_are_there_when_asked_for() -> None:
    code = "import kv4; print(kv4.Recipe().window >= 0, kv4.Side.__name__, kv4.__version__ == kv4._core.version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "Side", "True"]
    assert {"Recipe", "Side", "__version__", "num_threads"} <= set(dir(kv4))
    with pytest.raises(AttributeError, match="module 'kv4' has no attribute 'recipes'"):
        _ = kv4.recipes
