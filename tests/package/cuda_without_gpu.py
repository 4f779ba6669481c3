"""Run with a wheel that has the CUDA kernels, where no GPU is: it works on the CPU and says why CUDA is not there."""

import subprocess
import sys
from pathlib import Path

from kv4 import _core

reason = _core.why_not("cuda")
assert reason == "no device that it serves", f"cuda: expected no device that it serves; got {reason!r}"
subprocess.run([sys.executable, Path(__file__).with_name("ten_lines.py")], check=True)
print(f"cuda: {reason}")
