"""The recorded launches of the kernels' tests on a real Apple GPU, against the emulator's outputs.

    python tests/metal/on_device.py pack --tests build/release/tests/metal/kv4_metal_tests --to FOLDER     on Linux
    python tests/metal/on_device.py run FOLDER                    on macOS, needs torch; status 1 if anything differs

Untested: no Apple GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from measure import enums

TOLERANCE = 2e-3  # of the largest magnitude, as in the kernels' own tests
# Bytes of sealed pages that may differ: a value next to a decision boundary may get the neighbouring code, and a scale
# may round the other way.
SHARE = 0.01
DTYPES = (np.float32, np.float16, None)  # of enum kv4_call_out_dtype; bfloat16 is compared by hand


def pack(tests: Path, to: Path) -> None:
    """FOLDER/<file>.metal, one text each; FOLDER/launches.json; FOLDER/<launch>.npz: buffers before and after."""
    from emulator import INPUT, Module, build, load
    from emulator.replay import read, replay
    from mutate import ENTRY, SOURCES, chosen, record

    record(tests, to / "recorded")
    described = []
    for prefix, stem in ENTRY.items():
        source = SOURCES / "metal" / f"{stem}.metal"
        text = re.sub(r"^# \d+ .*$", "", load(source)[0], flags=re.M)
        (to / source.name).write_text("#include <metal_stdlib>\n" + text)
        launches = chosen(to / "recorded", prefix)
        module = Module(build(source, "fast", only=sorted({read(path).kernel for path in launches})))
        for path in launches:
            launch = read(path)
            done, after = replay(module, launch)
            if done.reports:
                raise SystemExit(f"{path.name}: {done.reports}")
            kinds = [-1 if held is None else held[0] for held in launch.buffers]
            types = [p["type"] if p else "" for p in module.kernels[launch.kernel]]
            before = [np.frombuffer(held[1] if held else b"\0" * 16, np.uint8) for held in launch.buffers]
            arrays = {f"before{i}": x for i, x in enumerate(before)}
            arrays |= {f"after{i}": np.frombuffer(x, np.uint8) for i, x in enumerate(after) if kinds[i] != INPUT}
            np.savez_compressed(to / f"{path.stem}.npz", **arrays)
            described.append({"name": path.stem, "kernel": launch.kernel, "source": source.name, "grid": launch.grid,
                              "group": launch.group, "kinds": kinds, "types": types})  # fmt: skip
    (to / "launches.json").write_text(json.dumps(described))


def as_floats(data: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == 2:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(DTYPES[dtype]).astype(np.float32)


def out_dtype(launch: dict, arrays) -> int:
    """Of kv4_merge's output: the call's own table says."""
    call = next(i for i, kind in enumerate(launch["types"]) if kind.endswith(" call"))
    return int(arrays[f"before{call}"].view(np.int64)[enums()["kv4_call_out_dtype"]])


def difference(launch: dict, i: int, was: np.ndarray, now: np.ndarray, arrays) -> str:
    """What is wrong with output i; "" if nothing is."""
    kind = launch["types"][i]
    if launch["kernel"] == "kv4_merge" and (held := out_dtype(launch, arrays)) in (0, 1, 2):
        dtype = held
    elif "float" in kind or launch["kernel"] == "kv4_merge":
        dtype = 0
    else:
        share = float((was != now).mean())
        return f"{share:.4f} of the bytes differ; at most {SHARE}" if share > SHARE else ""
    a, b = as_floats(was, dtype), as_floats(now, dtype)
    finite = np.isfinite(a) & (np.abs(a) < 1e30)
    scale = float(np.abs(a[finite]).max(initial=1e-30))
    worst = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale
    return "" if worst <= TOLERANCE else f"differs by {worst:.2e} of the largest magnitude; at most {TOLERANCE}"


def run(folder: Path) -> int:
    import torch

    if not torch.backends.mps.is_available():
        raise SystemExit("device: expected an Apple GPU that torch can use; got none")
    libraries: dict[str, object] = {}
    failed = 0
    for launch in json.loads((folder / "launches.json").read_text()):
        source = launch["source"]
        if source not in libraries:
            libraries[source] = torch.mps.compile_shader((folder / source).read_text())
        arrays = np.load(folder / f"{launch['name']}.npz")
        tensors = [torch.from_numpy(arrays[f"before{i}"].copy()).to("mps") for i in range(len(launch["kinds"]))]
        getattr(libraries[source], launch["kernel"])(*tensors, threads=launch["grid"], group_size=launch["group"])
        torch.mps.synchronize()
        wrong = []
        for i, tensor in enumerate(tensors):
            if f"after{i}" in arrays:
                now = tensor.cpu().numpy()
                if what := difference(launch, i, arrays[f"after{i}"], now, arrays):
                    wrong.append(f"{launch['types'][i]}: {what}")
        failed += bool(wrong)
        print(launch["name"], "; ".join(wrong) or "as emulated")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pack")
    p.add_argument("--tests", type=Path, required=True)
    p.add_argument("--to", type=Path, required=True)
    r = commands.add_parser("run")
    r.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.folder)
    arguments.to.mkdir(parents=True, exist_ok=True)
    pack(arguments.tests, arguments.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
