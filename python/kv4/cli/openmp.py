"""The spin limit of the command's OpenMP threads.

torch and kv4 share GNU's OpenMP threads. By default a thread that is idle, or waits at the barrier after a loop, spins
300,000 times, some milliseconds, before it sleeps. On an idle machine that costs nothing. Where other programs compete
for the CPUs, the spinning thread takes the time that the thread it waits for needs, and a token of a small model, which
has some 150 such loops, takes several times as long. The command limits spinning to about the time between the loops of
a step: a thread that sleeps between them has to be woken for each.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# Either sets how long threads spin. The runtime reads them once, when it is loaded.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = 10_000  # 0.1 to 0.5 ms


def bound_spin(environment: MutableMapping[str, str]) -> None:
    """Limits spinning in this process and its children, unless the user has set either variable. Has an effect only
    before kv4's compiled module or torch is imported."""
    if not any(environment.get(name) for name in VARIABLES):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
