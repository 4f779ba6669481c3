"""Busy neighbours: child processes that keep CPUs occupied while something is measured.

Threads that wait for each other are cheap on an idle machine and dear on a loaded one, where the thread that is waited
for may be one that the scheduler has put aside. Only a measurement with neighbours shows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# A neighbour ends when its standard input does, which the system closes however its parent ends. It says when it has
# begun, and leaves Ctrl-C, which a terminal sends to all, to its parent.
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
    """`count` busy processes, each of one thread, all at work when the block begins and gone when it ends. Yields their
    process ids.

    pin: one on each CPU that this process may use, in turn; otherwise, and where the system has no affinities, they run
    where the scheduler puts them. Errors: ValueError for a negative count; OSError where a process does not start.
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
