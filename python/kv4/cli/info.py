"""`kv4 info`: this machine and installation."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.markup import escape

from kv4.cli.openmp import VARIABLES
from kv4.cli.output import out, plain_errors, table, write_json


def collect() -> dict[str, Any]:
    import torch

    from kv4 import _core

    devices = [{"name": "cpu", "description": _cpu_name(), "kv4": True}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        reason = _core.why_not("cuda")
        name, described = f"cuda:{index}", torch.cuda.get_device_name(index)
        devices.append({"name": name, "description": described, "kv4": not reason, "reason": reason})
    return {
        "kv4": _core.version(),
        "isa": _core.isa(),
        "isa_reason": _core.why_no_isa(),
        "isas": list(_core.isas()),
        "threads": _core.num_threads(),
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "openmp": {name: os.environ.get(name) for name in VARIABLES},
        "devices": devices,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": _package("transformers"),
    }


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@plain_errors
def info(
    json_: Annotated[bool, typer.Option("--json", help="Exact data on stdout.")] = False,
) -> None:
    """Version, instruction set, threads, devices and the libraries around kv4."""
    found = collect()
    if json_:
        write_json(found, "-")
        return
    shown = table("kv4", "what", "here", left=("what", "here"))
    shown.add_row("version", found["kv4"])
    others = [isa for isa in found["isas"] if isa != found["isa"]]
    note = f"  (also here: {', '.join(others)})" if others else ""
    shown.add_row("instruction set", found["isa"] + note if found["isa"] else f"none  ({escape(found['isa_reason'])})")
    shown.add_row("threads", f"{found['threads']}  (torch {found['torch_threads']}, CPUs {found['cpus']})")
    waits = ", ".join(f"{name}={value}" for name, value in found["openmp"].items() if value)
    shown.add_row("threads wait", waits or "as the OpenMP runtime has it")
    for device in found["devices"]:
        note = "" if device["kv4"] else f"  (not used by kv4: {device['reason']})"
        shown.add_row(f"device {device['name']}", escape(device["description"]) + note)
    for name in ("python", "torch", "transformers", "platform"):
        shown.add_row(name, escape(str(found[name] or "not installed")))
    out.print(shown)
