"""Busy neighbours: child processes that keep CPUs occupied while something is measured.

Synchronising threads is cheap on an idle machine and expensive on a loaded one, where the scheduler may have preempted
the thread that the others wait for. Only a measurement with neighbours shows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# A neighbour exits at the end of its standard input, which the system closes however its parent exits. It reports when
# it has started, and ignores Ctrl-C, which a terminal sends to the whole process group: its parent handles that.
_BUSY = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
cpu = int(sys.argv[1])
if cpu >= 0:
    os.sched_setaffinity(0, {cpu})
def wait():
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=wait).start()
os.write(1, b"+")
while True:
    pass
"""


@contextmanager
def neighbours(count: int, *, pin: bool = True) -> Iterator[list[int]]:
    """`count` busy processes of one thread each, all running when the block begins and gone when it ends. Yields their
    process ids.

    pin: to the CPUs that this process may use, round robin; otherwise, and where the system has no affinities, the
    scheduler places them. Errors: ValueError for a negative count; OSError where a process does not start.
    """
    if count < 0:
        raise ValueError(f"count: expected at least 0; got {count}")
    cpus = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_getaffinity") else [-1]
    with ExitStack() as stack:
        started = [stack.enter_context(_neighbour(cpus[i % len(cpus)])) for i in range(count)]
        for process in started:
            assert process.stdout is not None
            if process.stdout.read(1) != b"+":
                raise OSError(f"neighbours: expected {count} busy processes; got one that ended before it began")
        yield [process.pid for process in started]


@contextmanager
def _neighbour(cpu: int) -> Iterator[subprocess.Popen]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _BUSY, str(cpu)], stdin=pipe, stdout=pipe, bufsize=0)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            if end is not None:
                end.close()
